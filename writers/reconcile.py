"""Reconciliation with the Stripe API: find the events that never reached us and the objects that differ, and repair both.

What is right goes through the raw topic like every webhook, so it is kept, deduplicated and ordered like all else: a fetched
event has the id it always had, a fetched object is a version at the response's `Date`. Each difference is a row of
`ops.reconciliation_drift`, committed together with the position that the comparison has reached, after what repairs it is
durable in Kafka. A run that dies goes on behind its last commit and sends at most that much twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import polars as pl

from lakehouse.declarations import load_reference
from lakehouse.drift import FOUND, OBJECT, Position, open_drift, positions
from lakehouse.errors import UsageError
from lakehouse.lake import Lake
from writers.canonical import PLATFORM, held_events
from writers.reconcile_job import (
    CONSUMER,
    EVENTS,
    OBJECTS,
    SETTLE_SECONDS,
    Job,
    Report,
    Say,
    event_of,
    text_of,
    utc,
    whole_objects,
)
from writers.stripe_api import Item, StripeReader
from writers.sweep import StripeList, sweep
from writers.webhook_records import Produce

DAY, HOUR = 86_400, 3_600
REACH_SECONDS = 30 * DAY  # of the Events API: https://docs.stripe.com/api/events/list
OVERLAP_SECONDS = HOUR
"""A run begins this much before the last one ended: an event may become visible in the API a little late."""
KEEP_EVERY_SECONDS = 5.0
"""Where nothing is missing, the position is committed this often: it bounds what an interrupted run lists again."""


def reconcile(
    lake: Lake,
    reader: StripeReader,
    produce: Produce | None,
    *,
    since: datetime | None = None,
    events: bool = True,
    objects: Sequence[str] = (),
    say: Say = lambda *_: None,
) -> Report:
    """Compare one account with Stripe and repair what differs; with `produce` None only tell (a dry run).

    events: whether to list events; since: from there (at most 30 days back), else from where the last run ended. objects: types
    to sweep, whatever their age, or `all`; a sweep that was interrupted goes on.

    Raises:
        UsageError: an object type that has no list. Fenced: another reconciliation of this account runs. Retryable: Stripe or
            Kafka stays away. Terminal: Stripe refuses the key.
    """
    lists = {row["object_type"]: row for row in load_reference(lake.settings.catalog_dir, "stripe_lists")}
    if unknown := [o for o in objects if o not in lists and o != "all"]:
        raise UsageError(f"no list of Stripe's is swept for {unknown[0]!r}; object types: all, {', '.join(lists)}")
    report = Report(lake.run.run_id, reader.account or PLATFORM, reader.livemode)
    job = Job(lake, reader, produce, report, say, datetime.now(UTC))
    if events:
        _events(job, since)
    for object_type, row in lists.items():
        if object_type in objects or "all" in objects:
            sweep(job, StripeList(**row))
    for source in (EVENTS, OBJECTS):
        rows = _own(job, open_drift(lake, source))
        report.open += rows.height
        report.lasting += rows.filter(pl.col("run_id") != report.run_id, pl.col("seen_at") >= job.began).height
    report.requests, report.refused, report.failed = reader.spent.requests, reader.spent.refused, reader.spent.failed
    report.waited_seconds = round(reader.budget.waited, 3)
    return report


def _own(job: Job, drift: pl.DataFrame) -> pl.DataFrame:
    return drift.filter((pl.col("account") == job.account) & (pl.col("livemode") == job.reader.livemode))


def windows(start: int, end: int, fits: Callable[[], bool]) -> Iterator[tuple[int, int]]:
    """[start, end) cut into windows: an hour first; after one that `fits` in a page twice as long, up to a day, else an hour."""
    width = HOUR
    while start < end:
        stop = min(start + width, end)
        yield start, stop
        start = stop
        width = min(width * 2, DAY) if fits() else HOUR


@dataclass
class _Pending:
    """What was compared since the last commit: rows of drift, and the ids that Stripe listed."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


def _events(job: Job, since: datetime | None) -> None:
    """List the events of each window, oldest first, and send those that raw does not hold."""
    topic = (f"events.{job.account}.{'live' if job.reader.livemode else 'test'}", 0)
    began_at = stood = positions(job.lake, CONSUMER).get(topic, 0)
    now = job.reader.now()
    reach, end = now - REACH_SECONDS, now - SETTLE_SECONDS
    waiting = _close_arrived(job)
    if stood and stood < reach:
        job.report.events.unreachable_from = utc(stood).isoformat()
    start = max(int(since.timestamp()) if since else min([stood - OVERLAP_SECONDS, *waiting]), reach)
    # a later --since leaves a gap behind the position, which must not be jumped over
    advances = start <= max(stood, reach)
    pending, pages = _Pending(), [0]
    for begin, stop in windows(start, end, lambda: pages[0] <= 1):
        pages[0] = 0
        listed: list[tuple[Item, int]] = []
        for page in job.reader.pages("events", created={"gte": begin, "lt": stop}):
            pages[0] += 1
            listed += [(item, page.at) for item in page.items]
            job.say(f"events of {utc(begin):%d %B %H:%M}", begin - start, end - start)
        pending.rows += _compare_window(job, listed, begin, stop)
        pending.listed += [item.id for item, _ in listed]
        stood = max(stop, stood) if advances else stood
        if pending.rows or stop == end or time.monotonic() - pending.since >= KEEP_EVERY_SECONDS:
            checked = pl.DataFrame({"object_id": pending.listed}, schema={"object_id": pl.String})
            position = Position(CONSUMER, {topic: began_at}, {topic: stood})
            job.keep(EVENTS, whole_objects(job, "event", pending.rows), job.named("event", checked), position)
            began_at, pending = stood, _Pending()


def _close_arrived(job: Job) -> list[int]:
    """Resolve the events that were missing and have arrived since; returns when those still missing were created."""
    rows = _own(job, open_drift(job.lake, EVENTS)).filter(pl.col("state") == "missing", pl.col("theirs_at").is_not_null())
    if rows.is_empty():
        return []
    created = [int(at.timestamp()) for at in rows["theirs_at"]]
    held = held_events(job.lake, job.reader.account, job.reader.livemode, utc(min(created)), utc(max(created) + 1))
    arrived = rows.join(held, left_on="object_id", right_on="event_id", how="semi")
    if arrived.height:
        job.keep(EVENTS, pl.DataFrame(schema=FOUND), arrived.select(OBJECT), Position(CONSUMER, {}, {}))
    left = rows.join(held, left_on="object_id", right_on="event_id", how="anti")
    return [int(at.timestamp()) for at in left["theirs_at"]]


def _compare_window(job: Job, listed: Sequence[tuple[Item, int]], begin: int, stop: int) -> list[dict[str, Any]]:
    """Send what Stripe lists and raw does not hold; returns what differs. Raw is read last: what came meanwhile is not missed."""
    held = held_events(job.lake, job.reader.account, job.reader.livemode, utc(begin), utc(stop))
    known, told = set(held["event_id"]), {item.id for item, _ in listed}
    missing = [(item, at) for item, at in listed if item.id not in known]
    rows: list[dict[str, Any]] = []
    for item, _ in missing:
        event = event_of(item.body)
        job.on_their_way |= {event.data.object.id}
        theirs = text_of({"type": event.type, "object": event.data.object.id})
        rows.append({"object_id": item.id, "state": "missing", "theirs": theirs, "theirs_at": utc(item.created), "sent": True})
    extra = held.filter(~pl.col("event_id").is_in(told))
    rows += [{"object_id": e, "state": "extra", "ours": text_of({"type": kind})} for e, kind in extra.iter_rows()]
    counts = job.report.events
    counts.sent += job.send([(_of_account(item.body, job.reader.account), at) for item, at in missing], "events_api")
    counts.listed += len(listed)
    counts.missing += len(missing)
    counts.extra += extra.height
    return rows


def _of_account(body: bytes, account: str | None) -> bytes:
    """An event of a connected account says so: Stripe leaves it out where the request named the account, a webhook has it."""
    if account is None or event_of(body).account is not None:
        return body
    return b'{"account":' + msgspec.json.encode(account) + b"," + body.lstrip()[1:].lstrip()
