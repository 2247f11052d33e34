"""When a day is complete: nothing that belongs to it is awaited any more.

A table by day says in its declaration which topics it waits for, and how long after the end of a day (`complete`). A topic is
known up to its watermark: the least, over its partitions, of the last receipt that was taken up. The table's `complete` column is
true for the days that each of its topics has passed by so much; what comes later (a refund, a repair) still changes the day.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from uuid import UUID
from zoneinfo import ZoneInfo

import sqlglot
from pyiceberg.table import Table
from sqlglot import exp

from lakehouse.coordinates import ranges_sql
from lakehouse.cuts import raw_roots
from lakehouse.declarations import Declaration, load_reference
from lakehouse.lake import Lake
from lakehouse.positions import TopicPartition, Vector, vector_of
from lakehouse.queries import connect, tables_read
from lakehouse.settings import Settings
from lakehouse.transforms import Transform, load_transforms, upstream

NEVER = date(1, 1, 1)
"""`complete_until` of a table that has not taken up anything of one of its topics."""

LOOKED_BACK = 10_000  # offsets below a position among which its last record is looked for first


def received_until(lake: Lake, clock: str, reached: Vector, settle_seconds: int) -> datetime | None:
    """Up to when everything that was received of a raw table lies below the positions `reached`; None: nothing does.

    It is the least, over the partitions of the table's topic, of the last receipt below the position, less the time that a
    record may take from receipt to its topic. So a partition that brings nothing holds it back: that is the honest answer.
    """
    table = lake.find(clock)
    current = table.current_snapshot() if table else None
    if table is None or current is None:
        return None
    own = vector_of(table.metadata, clock)
    below = frozenset((k, min(v, own[k])) for k, v in reached.items() if k in own and v > 0)
    last = _last_receipt(_Clock(table.metadata.table_uuid, current.snapshot_id, table, lake.settings), below)
    return last - timedelta(seconds=settle_seconds) if last else None


@dataclass(frozen=True)
class _Clock:
    """A raw table at a snapshot; equal by these two alone."""

    table_uuid: UUID
    snapshot_id: int
    table: Table = field(compare=False)
    settings: Settings = field(compare=False)


@lru_cache(maxsize=16)  # most tables of a run stand at the same positions
def _last_receipt(clock: _Clock, below: frozenset[tuple[TopicPartition, int]]) -> datetime | None:
    """The least, over the partitions, of the last receipt below these offsets."""
    latest: dict[TopicPartition, datetime] = {}
    with connect(clock.settings) as connection:
        for start in (LOOKED_BACK, None):
            ranges = {k: (0 if start is None else max(0, v - start), v) for k, v in below if k not in latest}
            if not ranges:
                break
            rows = ranges_sql(clock.table, clock.snapshot_id, ranges)
            for topic, partition, received_at in connection.execute(
                f"SELECT topic, partition, max(received_at) FROM {rows} GROUP BY topic, partition"
            ).fetchall():
                latest[topic, partition] = received_at.astimezone(UTC)
    # a partition of which raw holds nothing any more was quiet for longer than raw is kept
    return min(latest.values(), default=None)


def complete_until(lake: Lake, declared: Declaration, reached: Vector) -> date:
    """The last complete day of a table that has taken up its inputs to `reached`; `NEVER` if there is none."""
    rule = load_reference(lake.settings.catalog_dir, "ledger")[0]
    zone = ZoneInfo(rule["time_zone"])
    days = []
    for awaited in declared.complete:
        known = received_until(lake, awaited.clock, reached, rule["settle_seconds"])
        if known is None:
            return NEVER
        days.append((known - timedelta(hours=awaited.after_hours)).astimezone(zone).date() - timedelta(days=1))
    return min(days, default=NEVER)


@dataclass(frozen=True)
class Standing:
    """How far a table has come: the last complete day (None: it has no days), and up to when each source was received."""

    table: str
    complete_until: date | None = None
    received_until: Mapping[str, datetime | None] = field(default_factory=dict)


def standings(lake: Lake, names: Iterable[str], transforms: Mapping[str, Transform]) -> dict[str, Standing]:
    """How far each of the tables has come. One that says nothing of days is complete as far as those it is made from.

    That goes for a table made only of tables by day (a funnel over days); what is made of single records has no days.
    """
    settle = load_reference(lake.settings.catalog_dir, "ledger")[0]["settle_seconds"]
    found = {}
    for name in names:
        reached = lake.vector(name)
        by_day = [lake.declarations[n] for n in _by_day(lake, name, transforms)]
        found[name] = Standing(
            name,
            min(complete_until(lake, d, reached) for d in by_day) if by_day else None,
            {clock: received_until(lake, clock, reached, settle) for clock in sorted(raw_roots(lake, name, transforms))},
        )
    return found


def notes(lake: Lake, sql: str, known: Container[str] = ()) -> dict[str, str]:
    """{table: until when it is complete} of the tables by day that a query reads, known ones left out; none if it asks itself."""
    tree = sqlglot.parse_one(sql, dialect="duckdb")
    asked = any(c.name.lower() == "complete" for c in tree.find_all(exp.Column))
    if asked or not any(d.complete for d in lake.declarations.values()):
        return {}
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    names = [n for n in tables_read(sql) if n in lake.declarations and n not in known and _by_day(lake, n, transforms)]
    return {n: said(standing) for n, standing in standings(lake, names, transforms).items()} if names else {}


def said(standing: Standing) -> str:
    """Until when a table by day is complete, and what it goes by."""
    until = f"is complete until {standing.complete_until}, later days can still change"
    if standing.complete_until in (None, NEVER):
        until = "has no complete day yet"
    received = ", ".join(f"{k} to {v:%Y-%m-%d %H:%M}Z" if v else f"{k}: nothing" for k, v in standing.received_until.items())
    return f"{standing.table} {until} (received: {received})"


def _by_day(lake: Lake, name: str, transforms: Mapping[str, Transform]) -> list[str]:
    """The table itself if it says when a day is complete, else the tables by day that it is made of alone."""
    declared = lake.declarations[name]
    if declared.complete:
        return [name]
    below = [_by_day(lake, n, transforms) for n in upstream(declared, transforms[name])] if name in transforms else []
    return [n for part in below for n in part] if below and all(below) else []
