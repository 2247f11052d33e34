"""Sweeps: every object of one type at Stripe is compared with ours, field by field, however old it is.

The Events API reaches back 30 days. What was missed before that shows only in the objects: where one differs, the object
as fetched becomes a version at the response's `Date`. A sweep goes down in `created` from the newest, so that an interrupted
one goes on below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from lakehouse.drift import OBJECT, WHOLE, Position, compare, open_drift, positions
from writers.canonical import (
    held_fields,
    held_objects,
    is_deleted,
    last_fields,
    normalise,
    not_built_yet,
    snapshot_event,
    without_renderings,
)
from writers.reconcile_job import CONSUMER, OBJECTS, SETTLE_SECONDS, Job, Sweep, event_of, text_of, utc, whole_objects
from writers.stripe_api import Item

SCALE = 10**10


def sweep_offset(sweep: int, created: int) -> int:
    """Where sweep number `sweep` (from 1) stands as one number that only grows: it goes down in `created` (epoch s), to 0."""
    return sweep * SCALE + SCALE - 1 - created


def sweep_stands(offset: int) -> tuple[int, int]:
    """The inverse of `sweep_offset`; an offset that was never set is a sweep 0 that is complete."""
    return (offset // SCALE, SCALE - 1 - offset % SCALE) if offset else (0, 0)


@dataclass(frozen=True)
class StripeList:
    """One list of the Stripe API: a row of catalog/reference/stripe_lists.yaml."""

    object_type: str
    path: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    deletable: bool = False


def sweep(job: Job, of: StripeList) -> None:
    """Compare all objects of one type, newest first: whatever was missed longer ago than the Events API reaches."""
    object_type = of.object_type
    counts = job.report.objects.setdefault(object_type, Sweep())
    topic = (f"objects.{object_type}.{job.account}.{'live' if job.reader.livemode else 'test'}", 0)
    stood = positions(job.lake, CONSUMER).get(topic, 0)
    number, upto = sweep_stands(stood)
    if upto == 0:
        number, upto = number + 1, job.reader.now()
    seen: set[str] = set()
    batch: list[tuple[Item, int]] = []
    for page in job.reader.pages(of.path, created={"lte": upto}, **of.parameters):
        batch += [(item, page.at) for item in page.items]
        seen |= {item.id for item in page.items}
        job.say(object_type, counts.checked + len(batch), 0)
        if batch and page.has_more and len(batch) >= job.lake.settings.batch_rows:
            reached = sweep_offset(number, max(batch[-1][0].created, 1))
            _compare_batch(job, of, counts, batch, Position(CONSUMER, {topic: stood}, {topic: reached}))
            stood, batch = reached, []
    done = sweep_offset(number, 0)
    held = held_objects(job.lake, job.account, job.reader.livemode, object_type)
    gone = _gone(job, of, {i for i, since in held.items() if since <= upto} - seen)
    # what is neither listed nor held any more is deleted on both sides: whatever was open about it is settled
    over = _open_ids(job, object_type) - seen - held.keys()
    _compare_batch(job, of, counts, batch, Position(CONSUMER, {topic: stood}, {topic: done}), gone, sorted(over))


def _compare_batch(
    job: Job,
    of: StripeList,
    counts: Sweep,
    batch: Sequence[tuple[Item, int]],
    position: Position,
    gone: Sequence[tuple[str, bytes, int]] = (),
    over: Sequence[str] = (),
) -> None:
    """Compare fetched objects with ours, send a version of each that differs, and keep what differed.

    gone: (id, what Stripe says of it, `Date`) of objects that we hold and Stripe does not; over: ids that neither holds any more.
    """
    object_type = of.object_type
    fetched_at = {item.id: at for item, at in batch}
    payload = {
        f"snap_{item.id}_{at}": (snapshot_event(item.body, object_type, item.id, at, **_rendering(job)), item.id, at)
        for item, at in batch
    }
    fetched = normalise(job.lake, [(e, p[0]) for e, p in payload.items()], job.began)
    objects = fetched.versions.select(OBJECT).unique()
    theirs = last_fields(job.lake, fetched.versions)
    found = compare(held_fields(job.lake, objects), theirs).filter(pl.col("state") != "extra")
    found = without_renderings(job.lake, found)
    parents = fetched.versions.select(*OBJECT, "event_id").unique(OBJECT, keep="first", maintain_order=True)
    of_parent = found.select(OBJECT).unique().join(parents, on=OBJECT)["event_id"].unique().to_list()
    differing = {e: payload[e] for e in of_parent}
    busy = _busy(job, min(at for _, at in batch)) if differing else set()
    moving = [e for e, (_, object_id, _) in differing.items() if object_id in busy]
    still = parents.filter(~pl.col("event_id").is_in(moving))
    found = found.join(still.select(OBJECT), on=OBJECT, how="semi")
    send = [(body, at) for e, (body, _, at) in differing.items() if e not in moving]
    for object_id, body, at in gone if of.deletable else ():
        send.append((snapshot_event(body, object_type, object_id, at, **_rendering(job)), at))
    sent = job.send(send, "api_snapshot")
    whole = found.filter(pl.col("field") == WHOLE, pl.col("object_type") == object_type).height
    counts.checked += len(batch)
    counts.missing += whole
    counts.extra += len(gone)
    counts.differing += len(differing) - len(moving) - whole
    counts.in_flight += len(moving)
    counts.refused += len(fetched.refused)
    counts.sent += sent
    times = pl.DataFrame(
        {"event_id": list(payload), "theirs_at": [utc(at) for _, _, at in payload.values()]},
        schema={"event_id": pl.String, "theirs_at": pl.Datetime("us", "UTC")},
    )
    found = found.join(parents.join(times, on="event_id").drop("event_id"), on=OBJECT, how="left")
    found = found.with_columns(sent=pl.lit(value=True))
    refused = [
        {
            "object_id": payload[e][1],
            "state": "missing",
            "theirs": text_of({"refused": why}),
            "theirs_at": utc(fetched_at[payload[e][1]]),
        }
        for e, why in fetched.refused.items()
    ]
    extra = [{"object_id": i, "state": "extra", "theirs_at": utc(at), "sent": of.deletable} for i, _, at in gone]
    rows = pl.concat([found, whole_objects(job, object_type, [*refused, *extra])])
    ended = job.named(object_type, pl.DataFrame({"object_id": list(over)}, schema={"object_id": pl.String}))
    job.keep(OBJECTS, rows, pl.concat([still.select(OBJECT), ended]), position)


def _rendering(job: Job) -> dict[str, Any]:
    return {"livemode": job.reader.livemode, "version": job.reader.version, "account": job.reader.account}


def _busy(job: Job, fetched_at: int) -> set[str | None]:
    """Ids of the objects of which something is on its way to us, so that a difference says nothing yet.

    Sent by this run, in raw and not built yet, or changed at Stripe within the time that a webhook may take.
    """
    recent: set[str | None] = set()
    for page in job.reader.pages("events", created={"gte": fetched_at - SETTLE_SECONDS}):
        recent |= {event.data.object.id for event in (event_of(item.body) for item in page.items)}
    return recent | not_built_yet(job.lake) | job.on_their_way


def _open_ids(job: Job, object_type: str) -> set[str]:
    """Ids of the objects of one type about which a difference is open."""
    rows = open_drift(job.lake, OBJECTS).filter(pl.col("object_type") == object_type, pl.col("account") == job.account)
    return set(rows.filter(pl.col("livemode") == job.reader.livemode)["object_id"])


def _gone(job: Job, of: StripeList, unlisted: set[str]) -> list[tuple[str, bytes, int]]:
    """Of the objects that we hold and Stripe did not list, those that it does not know when asked for them one by one."""
    found = []
    candidates = sorted(unlisted - job.on_their_way)
    for number, object_id in enumerate(candidates, 1):
        body, at = job.reader.retrieve(of.path, object_id)
        if body is None or is_deleted(body):
            found.append((object_id, body or text_of({"id": object_id, "object": of.object_type, "deleted": True}).encode(), at))
        job.say(f"{of.object_type}s that Stripe did not list", number, len(candidates))
    return found
