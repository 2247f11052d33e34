"""Building by periods: only the days (or months) that changed inputs touch are computed again.

What touches a period is read from the inputs themselves: the rows that differ between the snapshots that the table was last
made from and those it is made from now (lakehouse/changes.py). So a late refund or a repaired event touches its own day, whenever
it comes, and what was only compacted touches none. The declaration says for each input how a row falls on periods (`touched_by`).
The transform is the one that makes the whole table: it is given the inputs of the touched periods, and what it makes of others is
left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import TypeAlias
from zoneinfo import ZoneInfo

from pyiceberg.expressions import AlwaysTrue, BooleanExpression
from pyiceberg.types import DateType

from lakehouse.changes import changed_rows_sql
from lakehouse.commit import COMPACTION
from lakehouse.declarations import Touch, load_reference
from lakehouse.lake import history, snapshot_inputs
from lakehouse.live import files_where
from lakehouse.plans import Plan, Staged, live_files, stage_with
from lakehouse.predicates import all_of, any_of, at_least, below
from lakehouse.queries import REFERENCE, bind_sql, empty_sql, fetch, files_sql, tables_read
from lakehouse.staging import stage
from lakehouse.transforms import Inputs

MADE_BY = "made-by"
"""In the summary of a snapshot: what its rows were made by (`recipe`). Made otherwise, every period is outdated."""

Range: TypeAlias = tuple[date, date | None]
"""Days [from, to); to None: all that follow."""


def periods(plan: Plan) -> Staged:
    """Replace the rows of the touched periods; of all, if it is not known what changed since the table was last made."""
    note = {MADE_BY: recipe(plan)}
    inputs = plan.inputs()
    before = _inputs_before(plan, note[MADE_BY])
    touched = None if before is None else _touched(plan, inputs, before)
    if touched is None:
        plan.bind(plan.transform.inputs)
        rows = plan.transform.build(inputs).rows
        return Staged(stage(plan.table, plan.declared, rows), live_files(plan, AlwaysTrue()), rows=rows.num_rows, note=note)
    if not touched.ranges:
        return Staged((), new_input_rows=touched.rows, note=note)
    for name in plan.transform.inputs:
        _bind_touched(plan, name, touched.ranges)
    period = plan.declared.build.period
    assert period
    plan.connection.register("__built", plan.transform.build(inputs).rows)
    ours = _falls_on(f'"{period}"', touched.ranges)
    rows = fetch(plan.connection, f"SELECT * FROM __built WHERE {ours}")
    remove = live_files(plan, _overlaps(period, touched.ranges))
    kept = None
    if remove:
        columns = ", ".join(f'"{c}"' for c in plan.declared.column_names)
        held = files_sql(plan.table, remove)
        kept = fetch(plan.connection, f"SELECT {columns} FROM {held} WHERE NOT ({ours})")
    return Staged(stage_with(plan, rows, kept), remove, new_input_rows=touched.rows, rows=rows.num_rows, note=note)


def recipe(plan: Plan) -> str:
    """A hash of what the rows are made by, besides the inputs: the transform, the reference data it reads, how it is built."""
    names = [f"{REFERENCE}.ledger", *(n for n in tables_read(plan.transform.sql or "") if n.startswith(f"{REFERENCE}."))]
    content = [plan.transform.path.read_bytes(), repr(plan.declared.build).encode()]
    content += [repr(load_reference(plan.lake.settings.catalog_dir, n.partition(".")[2])).encode() for n in sorted(set(names))]
    return hashlib.sha256(b"\0".join(content)).hexdigest()[:16]


def _inputs_before(plan: Plan, made_by: str) -> dict[str, int] | None:
    """The snapshots of the inputs that the table's rows were made from; None if they were made otherwise, or that is not told."""
    for snapshot in history(plan.table):
        summary = snapshot.summary.additional_properties if snapshot.summary else {}
        if summary.get("lakehouse.kind") == COMPACTION:  # the same rows
            continue
        return snapshot_inputs(snapshot) if summary.get(f"lakehouse.{MADE_BY}") == made_by else None
    return None


@dataclass(frozen=True)
class _Touched:
    """The touched days (of a table by month: whole months), and how many rows of the inputs changed."""

    ranges: Sequence[Range]
    rows: int


def _touched(plan: Plan, inputs: Inputs, before: Mapping[str, int]) -> _Touched | None:
    """What the inputs' changes touch, and what has become complete since; None: everything, or it cannot be known."""
    found: list[Range] = list(_newly_complete(plan, inputs))
    count = 0
    for name, (table, snapshot) in plan.pinned.items():
        touch = plan.declared.build.touched_by.get(name)
        try:
            changed = changed_rows_sql(table, before.get(name), snapshot, _columns(plan, name, touch))
        except KeyError:  # the snapshot has expired
            return None
        if changed is None:
            continue
        kept = ", ".join(f'"{c}"' for c in _columns(plan, name, touch) if touch and (touch.since or c in _when(touch)))
        plan.connection.execute(f"CREATE OR REPLACE TEMP TABLE changed AS SELECT {kept or 'true AS changed'} FROM {changed}")
        rows = plan.connection.execute("SELECT count(*) FROM changed").fetchall()[0][0]
        if rows and touch is None:
            return None
        if rows and touch:
            count += rows
            found += _ranges_of(plan, inputs, name, touch)
    return _Touched(_merged(found, plan.declared.build.unit), count)


def _columns(plan: Plan, name: str, touch: Touch | None) -> list[str]:
    """The columns of an input in which a change matters: those that the transform names, and those that say when."""
    code = set(re.findall(r"\w+", plan.transform.path.read_text("utf-8"))) | (_when(touch) if touch else set())
    return [f.name for f in plan.pinned[name][0].schema().fields if f.name in code]


def _when(touch: Touch) -> set[str]:
    """The names that say when."""
    return {*touch.at, touch.since or "", touch.until or "", *re.findall(r"\w+", touch.via or "")}


def _ranges_of(plan: Plan, inputs: Inputs, name: str, touch: Touch) -> Iterable[Range]:
    """The days that the rows of `changed` touch."""
    connection = plan.connection
    for column in touch.at:
        day = _day(plan, name, column)
        for (found,) in connection.execute(f"SELECT DISTINCT {day} FROM changed WHERE {day} IS NOT NULL").fetchall():
            yield found, found + timedelta(days=1)
    if touch.since:
        first = f'min("{touch.since}")'
        if touch.until:
            # an interval that only ends at another time differs from the earlier end on, any other from its start
            same = ", ".join(f'"{c}"' for c in _columns(plan, name, touch) if c != touch.until)
            differs = f'CASE WHEN count(*) = 1 THEN min("{touch.since}") ELSE min("{touch.until}") END AS "{touch.since}"'
            connection.execute(f"CREATE OR REPLACE TEMP TABLE changed AS SELECT {differs} FROM changed GROUP BY {same}")
        found = connection.execute(f"SELECT {_day(plan, name, touch.since, first)} FROM changed").fetchall()[0][0]
        if found is not None:
            yield found - timedelta(days=touch.days_before), None
    if touch.via:
        for other in tables_read(touch.via):
            if other in plan.pinned:
                plan.bind([other])
        day = f"CAST(timezone('{_zone(plan).key}', moment) AS DATE)"
        days = inputs.sql(f"SELECT DISTINCT {day} AS day FROM ({touch.via}) WHERE moment IS NOT NULL").column("day")
        yield from ((day, day + timedelta(days=1)) for day in days.to_pylist())


def _newly_complete(plan: Plan, inputs: Inputs) -> Iterable[Range]:
    """The periods whose `complete` says otherwise than the watermarks now."""
    until = inputs.parameters.get("complete_until")
    files = live_files(plan, AlwaysTrue()) if until is not None else []
    if not files:
        return
    period, unit = plan.declared.build.period, plan.declared.build.unit
    held = files_sql(plan.table, files)
    over = f'"{period}" + INTERVAL 1 {unit} <= $until::DATE + INTERVAL 1 DAY'
    sql = f'SELECT DISTINCT "{period}" FROM {held} WHERE complete <> ({over})'
    for (day,) in plan.connection.execute(sql, {"until": until}).fetchall():
        yield day, day + timedelta(days=1)


def _merged(ranges: Iterable[Range], unit: str) -> list[Range]:
    """The ranges in order, what overlaps or meets as one; by month, each widened to whole months."""
    widened: list[Range] = []
    for start, end in ranges:
        if unit == "month":
            start = start.replace(day=1)
            end = None if end is None else ((end - timedelta(days=1)).replace(day=28) + timedelta(days=4)).replace(day=1)
        widened.append((start, end))
    merged: list[Range] = []
    for start, end in sorted(widened, key=lambda r: r[0]):
        if merged and (merged[-1][1] is None or start <= merged[-1][1]):
            last = merged[-1][1]
            merged[-1] = merged[-1][0], None if last is None or end is None else max(last, end)
        else:
            merged.append((start, end))
    return merged


def _zone(plan: Plan) -> ZoneInfo:
    return ZoneInfo(load_reference(plan.lake.settings.catalog_dir, "ledger")[0]["time_zone"])


def _is_date(plan: Plan, name: str, column: str) -> bool:
    return isinstance(plan.pinned[name][0].schema().find_field(column).field_type, DateType)


def _day(plan: Plan, name: str, column: str, value: str | None = None) -> str:
    """SQL: the day of a column of an input (or of `value`, made of it), in the zone of the books."""
    value = value or f'"{column}"'
    return value if _is_date(plan, name, column) else f"CAST(timezone('{_zone(plan).key}', {value}) AS DATE)"


def _falls_on(value: str, ranges: Sequence[Range]) -> str:
    """SQL: the date (or time) lies in one of the ranges."""
    return " OR ".join(
        f"({value} >= {_sql(start)}" + (f" AND {value} < {_sql(end)})" if end is not None else ")") for start, end in ranges
    )


def _sql(value: date) -> str:
    return f"TIMESTAMPTZ '{value.isoformat()}'" if isinstance(value, datetime) else f"DATE '{value.isoformat()}'"


def _overlaps(column: str, ranges: Sequence[Range]) -> BooleanExpression:
    """The same for Iceberg, to find files."""
    return any_of(all_of([at_least(column, start), *([] if end is None else [below(column, end)])]) for start, end in ranges)


def _bind_touched(plan: Plan, name: str, ranges: Sequence[Range]) -> None:
    """Bind an input to its name: what falls on the touched periods of one that is read by period, any other whole."""
    touch = plan.declared.build.touched_by.get(name)
    if touch is None or not touch.at:
        plan.bind([name])
        return
    table, snapshot = plan.pinned[name]
    zone = _zone(plan)

    def instant(day: date) -> datetime:
        return datetime.combine(day, time(), zone).astimezone(UTC)

    where, wanted = [], []
    for column in touch.at:
        spans: list[Range] = list(ranges)
        if not _is_date(plan, name, column):
            spans = [(instant(start), None if end is None else instant(end)) for start, end in ranges]
        where.append(_falls_on(f'"{column}"', spans))
        wanted.append(_overlaps(column, spans))
    files = files_where(table, any_of(wanted), snapshot)
    if not files:
        bind_sql(plan.connection, name, empty_sql(table))
        return
    columns = ", ".join(f'"{f.name}"' for f in table.schema().fields)
    bind_sql(plan.connection, name, f"(SELECT {columns} FROM {files_sql(table, files)} WHERE {' OR '.join(where)})")
