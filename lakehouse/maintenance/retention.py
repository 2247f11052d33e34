"""Retention: partitions whose time has passed are dropped whole, by the commit path; no row is looked at."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from lakehouse.commit import Change, commit
from lakehouse.declarations import Declaration
from lakehouse.errors import Replan
from lakehouse.lake import Run
from lakehouse.maintenance.planning import entries_where, time_partition
from lakehouse.predicates import below

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MAX_PLANS = 5


def outdated(table: Table, declared: Declaration, now: datetime) -> list[DataFile]:
    """The files of partitions that lie wholly before the retention; none if the table declares none, or no time partition."""
    part = time_partition(table)
    if declared.retention_days is None or part is None:
        return []
    cutoff = now - timedelta(days=declared.retention_days)
    spec = table.spec().spec_id
    return [
        e.data_file
        for e in entries_where(table, below(part.column, part.value(cutoff)))
        if e.data_file.spec_id == spec
        and e.data_file.partition[part.place] is not None
        and end_of(part.transform, e.data_file.partition[part.place]) <= cutoff
    ]


def end_of(transform: str, ordinal: int) -> datetime:
    """Where a partition ends (it does not hold that moment itself): hours, days, months or years since 1970."""
    if transform in ("hour", "day"):
        return EPOCH + timedelta(**{f"{transform}s": ordinal + 1})
    months = (ordinal + 1) * (12 if transform == "year" else 1)
    return datetime(1970 + months // 12, months % 12 + 1, 1, tzinfo=UTC)


def drop_outdated(table: Table, declared: Declaration, run: Run, now: datetime | None = None) -> tuple[int, int]:
    """Drop those partitions; positions stay as they are. Returns (files, rows) dropped."""
    for attempt in range(MAX_PLANS):
        table.refresh()
        files = outdated(table, declared, now or datetime.now(UTC))
        rows = sum(f.record_count for f in files)
        if not files:
            return 0, 0
        note = {"kind": "retention", "dropped-rows": str(rows)}
        try:
            commit(table, run, Change(declared.table, {}, {}, remove=files, rewrite=True, scope=frozenset(), note=note))
        except Replan:  # compacted meanwhile
            if attempt == MAX_PLANS - 1:
                raise
            continue
        return len(files), rows
    raise AssertionError("unreachable")
