"""Product use: who did what when, and when the record of it arrived. Columns only; `payloads` turns them into bytes.

Use is spread over segments: a workspace within one interval of its owner's plan. A segment's share of the events is its
intensity times the rhythm of day, week and webinar over it. In the week before an upgrade a further segment adds attempts
at what the next plan sells, so that a funnel can find the lift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from random import Random

import polars as pl

from simulator.catalogue import FEATURES, PLAN_FEATURES, PLAN_RANK, PLANS, UPGRADE_SIGNALS
from simulator.chance import below, generator, lookup, mixed, salt, u64, unit
from simulator.identity import EVERYTHING, IDENTIFY, NO_WORKSPACE, SHARES, People, moves
from simulator.timeline import PlanInterval
from simulator.workspaces import Workspace

HOUR, DAY = 3_600, 86_400
DUPLICATED, LATE, MALFORMED = 0.05, 0.10, 0.001
MAX_LATE_MS, MEAN_LATE_MS = 72 * HOUR * 1000, 10 * HOUR * 1000
LIFT_SECONDS, LIFT = 7 * DAY, 0.5
# 0 is a good record; the others are what `malformed` makes of one.
MALFORMATIONS = (
    "",
    "truncated",
    "not_json",
    "no_event_id",
    "no_occurred_at",
    "occurred_at_without_zone",
    "occurred_at_garbage",
    "occurred_at_40_days_old",
    "occurred_at_in_the_future",
    "workspace_id_number",
)
EVENT_NAMES = (
    "feature_used",
    "feature_attempted",
    "video_played",
    "video_completed",
    "upload_started",
    "upload_completed",
    "comment_created",
    "link_shared",
    "identify",
)
_NAMES_OF = {
    "playback": ("video_played", "video_played", "video_played", "video_completed"),
    "upload": ("upload_started", "upload_completed", "upload_completed", "upload_completed"),
    "comments": ("comment_created",) * 4,
    "share_link": ("link_shared",) * 4,
}
_PLAN_USE = {"starter": 1.0, "pro": 2.2, "enterprise": 5.0}
_STATUS_USE = {
    "active": 1.0,
    "trialing": 0.9,
    "past_due": 0.8,
    "unpaid": 0.35,
    "paused": 0.15,
    "incomplete": 0.3,
    "canceled": 0.06,
}
_BEFORE_SUBSCRIBING = 0.3
_GOOD_STANDING = ("active", "trialing", "past_due")
_POOL = 512
_BY_HOUR = (2, 1, 1, 1, 1, 2, 4, 7, 11, 14, 15, 14, 12, 13, 15, 15, 14, 12, 10, 9, 8, 6, 4, 3)
_BY_WEEKDAY = (1.0, 1.1, 1.1, 1.05, 0.9, 0.35, 0.3)
_WEBINAR_AT, _WEBINAR_HOURS, _WEBINAR_PEAK = 0.4, 3, 6.0


@dataclass(frozen=True, slots=True)
class Segment:
    """A workspace's use over [start, end) (epoch seconds) with one intensity and one pool of features."""

    workspace: int
    start: int
    end: int
    intensity: float
    pool: int
    rank: int


@dataclass(frozen=True, slots=True)
class Usage:
    """All product use as columns.

    `records` (sorted by received_at, then event_no): received_at, sent_at, occurred_at (epoch ms), event_no (UInt32),
    workspace, device, user (UInt32 indexes), told (UInt8: what is said of whose it is, see `identity`), feature (NULL for an
    identify event), name, malformation (UInt8 indexes). Duplicates share their event_no.
    `events`: event_no, occurred_at, workspace, device, user, told, feature, name: one row a unique valid event.
    """

    records: pl.DataFrame
    events: pl.DataFrame
    people: People


def _pools() -> list[list[int]]:
    """Features to draw from, `_POOL` indexes each: a pool a plan, then a pool a plan aspired to."""
    pools = []
    for plan in PLANS:
        weights: dict[str, float] = {}
        for other in PLANS:
            for place, feature in enumerate(PLAN_FEATURES[other]):
                if PLAN_RANK[other] < PLAN_RANK[plan]:
                    weights[feature] = 1.0 / (place + 2)
                elif PLAN_RANK[other] == PLAN_RANK[plan]:
                    weights[feature] = 1.3 / (place + 1)
                else:  # an attempt at what the plan does not hold
                    weights[feature] = 0.012
        pools.append(_spread(weights))
    return pools + [_spread(dict.fromkeys(UPGRADE_SIGNALS.get(plan, PLAN_FEATURES[plan]), 1.0)) for plan in PLANS]


def _spread(weights: Mapping[str, float]) -> list[int]:
    total, reached = sum(weights.values()), 0.0
    pool: list[int] = []
    for feature, weight in weights.items():
        reached += weight / total * _POOL
        pool += [FEATURES.index(feature)] * (round(reached) - len(pool))
    return pool


def _rhythm(start: int, days: int) -> list[float]:
    """Cumulated weight at each hour since the start, `24 * days + 1` values from 0."""
    webinar = int(days * _WEBINAR_AT) * 24 + 14
    cumulated = [0.0]
    for hour in range(days * 24):
        moment = datetime.fromtimestamp(start + hour * HOUR, UTC)
        weight = _BY_HOUR[moment.hour] * _BY_WEEKDAY[moment.weekday()]
        if webinar <= hour < webinar + _WEBINAR_HOURS:
            weight *= _WEBINAR_PEAK
        cumulated.append(cumulated[-1] + weight)
    return cumulated


def _at(cumulated: Sequence[float], start: int, second: int) -> float:
    hour, rest = divmod(min(max(second - start, 0), (len(cumulated) - 1) * HOUR), HOUR)
    if hour == len(cumulated) - 1:
        return cumulated[-1]
    return cumulated[hour] + (cumulated[hour + 1] - cumulated[hour]) * rest / HOUR


def upgrades(timeline: Sequence[PlanInterval]) -> list[tuple[int, str]]:
    """(second, new plan) of each change to a higher plan while the customer is in good standing."""
    found = []
    for before, after in pairwise(timeline):
        higher = PLAN_RANK[after.plan] > PLAN_RANK[before.plan]
        if higher and before.billing_status in _GOOD_STANDING and after.billing_status in _GOOD_STANDING:
            found.append((after.valid_from, after.plan))
    return found


def segments(
    rng: Random, workspaces: Sequence[Workspace], timelines: Mapping[str, Sequence[PlanInterval]], horizon: int
) -> list[Segment]:
    """Cut every workspace's life by owner and by the owner's plan; add the week before each upgrade."""
    made = []
    for index, workspace in enumerate(workspaces):
        base = rng.lognormvariate(0.0, 0.8)
        last = min(workspace.closed or horizon, horizon)
        ends = [since for since, _ in workspace.owners[1:]] + [last]
        for (since, owner), until in zip(workspace.owners, ends, strict=True):
            timeline = timelines.get(owner, ()) if owner else ()
            first = timeline[0].valid_from if timeline else until
            spans = [(since, min(first, until), "starter", _BEFORE_SUBSCRIBING)]
            spans += [
                (max(i.valid_from, since), min(i.valid_to or until, until), i.plan, _STATUS_USE[i.billing_status])
                for i in timeline
            ]
            for start, end, plan, share in spans:
                if start < end:
                    rank = PLAN_RANK[plan]
                    made.append(Segment(index, start, end, base * share * _PLAN_USE[plan], rank - 1, rank))
            for at, plan in upgrades(timeline):
                start, end = max(at - LIFT_SECONDS, since), min(at, until)
                if start < end:
                    rank = PLAN_RANK[plan]
                    made.append(Segment(index, start, end, base * LIFT, len(PLANS) + rank - 1, rank - 1))
    return made


def _counts(weights: Sequence[float], total: int) -> list[int]:
    """Share `total` out by weight: the running sum is rounded, so that it comes out exactly."""
    whole, counts, reached, given = math.fsum(weights), [], 0.0, 0
    for weight in weights:
        reached += weight
        upto = min(total, round(reached / whole * total))
        counts.append(upto - given)
        given = upto
    counts[-1] += total - given
    return counts


def make_usage(
    seed: int,
    workspaces: Sequence[Workspace],
    timelines: Mapping[str, Sequence[PlanInterval]],
    people: People,
    *,
    start: int,
    days: int,
    events: int,
) -> Usage:
    """Draw `events` unique valid events, their duplicates, lateness and the malformed records among them.

    Received on time: 0.2 to 20 s after they occurred; 10 % late, never more than 72 h, duplicates included.
    """
    rng = generator(seed, "usage")
    horizon = start + days * DAY
    parts = segments(rng, workspaces, timelines, horizon)
    cumulated = _rhythm(start, days)
    low = [_at(cumulated, start, s.start) for s in parts]
    width = [_at(cumulated, start, s.end) - a for s, a in zip(parts, low, strict=True)]
    total = events + max(len(MALFORMATIONS) - 1, round(events * MALFORMED))
    counts = _counts([s.intensity * w for s, w in zip(parts, width, strict=True)], total)
    users = [end - first for first, end in pairwise(people.first_user)]
    plan = pl.DataFrame(
        {
            "workspace": [s.workspace for s in parts],
            "low": low,
            "width": width,
            "from_ms": [s.start * 1000 for s in parts],
            "to_ms": [s.end * 1000 - 1 for s in parts],
            "pool": [s.pool for s in parts],
            "rank": [s.rank for s in parts],
            "users": [users[s.workspace] for s in parts],
            "first_user": [people.first_user[s.workspace] for s in parts],
        }
    )
    of_row = pl.int_range(len(parts), eager=True).repeat_by(pl.Series(counts)).explode().drop_nulls()
    drawn = _tell(_draw(plan[of_row].with_row_index("event_no"), seed, cumulated, start), seed, people)
    bad = rng.sample(range(total), total - events)
    kinds = pl.DataFrame({"event_no": bad, "malformation": [1 + i % (len(MALFORMATIONS) - 1) for i in range(len(bad))]})
    kinds = kinds.cast({"event_no": pl.UInt32, "malformation": pl.UInt8})
    drawn = drawn.join(kinds, on="event_no", how="left", maintain_order="left")
    drawn = drawn.with_columns(pl.col("malformation").fill_null(0))
    records = pl.concat([_arrive(drawn, seed), _arrive_again(_arrive(drawn, seed), seed)])
    records = records.sort("received_at", "event_no").rechunk()
    valid = drawn.filter(pl.col("malformation") == 0).drop("malformation")
    return Usage(records, valid, people)


def _draw(rows: pl.DataFrame, seed: int, cumulated: Sequence[float], start: int) -> pl.DataFrame:
    """When, who and what of each row."""
    steps = pl.Series("cumulated", cumulated)
    number = pl.col("event_no")
    rows = rows.with_columns(
        weight=pl.col("low") + unit(mixed(number, salt(seed, "when"))) * pl.col("width"),
        who=mixed(number, salt(seed, "who")),
        what=mixed(number, salt(seed, "what")),
    )
    hour = (steps.search_sorted(rows["weight"], side="right").cast(pl.Int64) - 1).clip(0, len(steps) - 2)
    pools = pl.Series("pools", [feature for pool in _pools() for feature in pool], dtype=pl.UInt8)
    plan_rank = pl.Series("rank", [PLAN_RANK[p] for p in PLANS for _ in PLAN_FEATURES[p]])
    rows = rows.with_columns(
        hour=hour, step=steps.gather(hour), next_step=steps.gather(hour + 1), draw=below(pl.col("what"), _POOL)
    ).with_columns(
        occurred_at=(
            start * 1000
            + ((pl.col("hour") + (pl.col("weight") - pl.col("step")) / (pl.col("next_step") - pl.col("step"))) * 3.6e6)
            .fill_nan(0)
            .cast(pl.Int64)
        ).clip(pl.col("from_ms"), pl.col("to_ms")),
        feature=lookup(pools, pl.col("pool") * _POOL + pl.col("draw")),
        # a few users are many times as active as the others
        user=pl.col("first_user") + (unit(pl.col("who")) ** 1.8 * pl.col("users")).cast(pl.Int64),
    )
    attempted = lookup(plan_rank, pl.col("feature").cast(pl.UInt32)) > pl.col("rank")
    names = [EVENT_NAMES.index(name) for f in FEATURES for name in _NAMES_OF.get(f, ("feature_used",) * 4)]
    named = lookup(pl.Series(names), pl.col("feature").cast(pl.UInt32) * 4 + below(pl.col("what"), 4, 20))
    return rows.select(
        "event_no",
        "occurred_at",
        pl.col("workspace").cast(pl.UInt32),
        device=(pl.col("user") * 2 + (below(pl.col("who"), 10, 3) < 3)).cast(pl.UInt32),
        feature=pl.col("feature"),
        name=pl.when(attempted).then(EVENT_NAMES.index("feature_attempted")).otherwise(named).cast(pl.UInt8),
    )


def _tell(drawn: pl.DataFrame, seed: int, people: People) -> pl.DataFrame:
    """Where those who moved work since, and what each event says of whose it is: columns `user` and `told` more."""
    chance, share, number = unit(mixed(pl.col("event_no"), salt(seed, "told"))), 0.0, pl.lit(EVERYTHING)
    for told, part in SHARES:
        number = pl.when((chance >= share) & (chance < share + part)).then(pl.lit(told)).otherwise(number)
        share += part
    away = (pl.col("occurred_at") >= pl.col("left_ms")) & (pl.col("occurred_at") < pl.col("joined_ms"))
    partners = pl.DataFrame(list(people.partners.items()), schema={"device": pl.UInt32, "partner": pl.UInt32}, orient="row")
    moved = moves(people).cast({"user": pl.UInt32, "moved_to": pl.UInt32})
    identify = pl.col("told") == IDENTIFY
    other = identify & pl.col("partner").is_not_null() & (below(mixed(pl.col("event_no"), salt(seed, "partner")), 2) == 0)
    return (
        drawn.with_columns(user=pl.col("device") // 2)
        .join(moved, on="user", how="left", maintain_order="left")
        .join(partners, on="device", how="left", maintain_order="left")
        .with_columns(told=number.cast(pl.UInt8))
        .with_columns(
            # between two workspaces nobody can name one
            told=pl.when(away & (pl.col("told") == EVERYTHING)).then(pl.lit(NO_WORKSPACE, pl.UInt8)).otherwise("told"),
            workspace=pl.when(pl.col("occurred_at") >= pl.col("joined_ms")).then("moved_to").otherwise("workspace"),
            user=pl.when(other).then("partner").otherwise("user"),
            name=pl.when(identify).then(pl.lit(EVENT_NAMES.index("identify"), pl.UInt8)).otherwise("name"),
            feature=pl.when(~identify).then("feature"),
        )
        .drop("left_ms", "joined_ms", "moved_to", "partner")
    )


def _arrive(drawn: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The first record of each event."""
    number = pl.col("event_no")
    delay = mixed(number, salt(seed, "delay"))
    # an exponential distribution cut off at 72 h, by its inverse: nothing piles up at the limit
    within = 1.0 - math.exp(-(MAX_LATE_MS - 60_000) / MEAN_LATE_MS)
    late_ms = (-MEAN_LATE_MS * (1.0 - unit(mixed(number, salt(seed, "lateness"))) * within).log()).cast(pl.Int64) + 20_000
    is_late = unit(delay) < LATE
    wait = pl.when(is_late).then(late_ms).otherwise(200 + below(delay, 19_800).cast(pl.Int64))
    return drawn.with_columns(received_at=pl.col("occurred_at") + wait).select(
        "received_at",
        sent_at=pl.max_horizontal(pl.col("received_at") - 40 - below(delay, 900, 40).cast(pl.Int64), "occurred_at"),
        occurred_at="occurred_at",
        event_no="event_no",
        workspace="workspace",
        device="device",
        user="user",
        told="told",
        feature="feature",
        name="name",
        malformation="malformation",
    )


def _arrive_again(arrived: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The duplicates: the same bytes again, or (every other one) the same event sent again with a later `sent_at`."""
    chance = mixed(pl.col("event_no"), salt(seed, "duplicate"))
    soon = 1_000 + below(chance, 120_000, 8).cast(pl.Int64)
    later = 1_000 + below(chance, DAY * 1000, 8).cast(pl.Int64)
    wait = pl.when(below(chance, 10, 3) < 7).then(soon).otherwise(later)
    return (
        arrived.filter((pl.col("malformation") == 0) & (unit(chance) < DUPLICATED))
        .with_columns(
            again=pl.min_horizontal(pl.col("received_at") + wait, pl.col("occurred_at") + MAX_LATE_MS - 1000),
            resent=(chance // u64(4)) % u64(2) == u64(1),
        )
        .with_columns(
            received_at=pl.col("again"),
            sent_at=pl.when("resent").then(pl.col("again") - 40).otherwise("sent_at"),
        )
        .select(arrived.columns)
    )
