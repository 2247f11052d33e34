"""Retention: partitions past their time are dropped whole, by the commit path, once every table built from them has read them.

Rows are looked at only where the statistics of a file leave open which offsets it holds of each partition of its topic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pyiceberg.conversions import from_bytes
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.types import PrimitiveType

from lakehouse.commit import Change, commit
from lakehouse.coordinates import COORDINATES
from lakehouse.dead_letters import open_letters
from lakehouse.declarations import Declaration
from lakehouse.errors import Replan, Retryable
from lakehouse.lake import Lake
from lakehouse.live import rows_left
from lakehouse.maintenance.planning import files_listed, time_partition
from lakehouse.positions import Vector
from lakehouse.predicates import below
from lakehouse.queries import connect, files_sql
from lakehouse.transforms import load_transforms, upstream

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
        file
        for file in files_listed(table, below(part.column, part.value(cutoff)))
        if file.spec_id == spec
        and file.partition[part.place] is not None
        and end_of(part.transform, file.partition[part.place]) <= cutoff
    ]


def end_of(transform: str, ordinal: int) -> datetime:
    """Where a partition ends (it does not hold that moment itself): hours, days, months or years since 1970."""
    if transform in ("hour", "day"):
        return EPOCH + timedelta(**{f"{transform}s": ordinal + 1})
    months = (ordinal + 1) * (12 if transform == "year" else 1)
    return datetime(1970 + months // 12, months % 12 + 1, 1, tzinfo=UTC)


def drop_outdated(lake: Lake, table: Table, declared: Declaration, now: datetime | None = None) -> dict[str, int]:
    """Drop those partitions; positions stay as they are.

    Returns:
        files and rows dropped; dead_letters: how many open ones point to what was dropped and cannot be replayed any more.

    Raises:
        Retryable: a table that is built from this one has not read all of them yet; nothing was dropped.
    """
    for attempt in range(MAX_PLANS):
        table.refresh()
        files = outdated(table, declared, now or datetime.now(UTC))
        figures = would_drop(lake, table, declared, files)
        if not files:
            return figures
        note = {"kind": "retention", "dropped-rows": str(figures["rows"]), "dead-letters": str(figures["dead_letters"])}
        change = Change(declared.table, {}, {}, remove=files, rewrite=True, scope=frozenset(), note=note)
        try:
            commit(table, lake.run, change)
        except Replan:  # compacted meanwhile
            if attempt == MAX_PLANS - 1:
                raise
            continue
        return figures
    raise AssertionError("unreachable")


def would_drop(lake: Lake, table: Table, declared: Declaration, files: Sequence[DataFile]) -> dict[str, int]:
    """What goes with these files, as `drop_outdated` returns it; raises as it does."""
    figures = {"files": len(files), "rows": rows_left(files), "dead_letters": 0}
    part = time_partition(table)
    if not files or part is None or not set(COORDINATES) <= {f.name for f in table.schema().fields}:
        return figures
    readers = _readers(lake, declared.table)
    _refuse_unread(lake, table, files, readers)
    ordinals = [f.partition[part.place] for f in files]
    begin, end = end_of(part.transform, min(ordinals) - 1), end_of(part.transform, max(ordinals))
    topics = {topic for topic, _ in lake.vector(declared.table)}
    for reader in readers:
        letters = open_letters(lake, reader, since=begin, until=end)
        figures["dead_letters"] += letters.filter(letters["topic"].is_in(topics)).height
    return figures


def _readers(lake: Lake, name: str) -> dict[str, Vector]:
    """The tables that are built from this one, and how far each has read; one that was not built yet has read nothing."""
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    return {r: lake.vector(r) for r, t in transforms.items() if name in upstream(lake.declaration(r), t)}


def _refuse_unread(lake: Lake, table: Table, files: Sequence[DataFile], readers: Mapping[str, Vector]) -> None:
    """Every reader must stand behind the last offset that these files hold of each partition of a topic."""
    name = ".".join(table.name())
    own = lake.vector(name)
    lowest = {key: min((v.get(key, 0) for v in readers.values()), default=reached) for key, reached in own.items()}
    doubtful = [f for f in files if not _surely_read(table, f, lowest)]
    if not doubtful:
        return
    with connect(lake.settings) as connection:
        last = connection.execute(
            f'SELECT topic, partition, max("offset") FROM {files_sql(table, doubtful)} GROUP BY ALL'
        ).fetchall()
    for reader, vector in readers.items():
        if behind := sorted((topic, part, end) for topic, part, end in last if vector.get((topic, part), 0) <= end):
            topic, part, end = behind[0]
            raise Retryable(
                f"{name}: {reader} has not read what would be dropped: it stands at offset {vector.get((topic, part), 0)} of "
                f"{topic}[{part}], which goes to {end}. Nothing was dropped; let it catch up: lakehouse run {reader}"
            )


def _surely_read(table: Table, file: DataFile, lowest: Vector) -> bool:
    """Whether the statistics of a file suffice: of no partition that it may hold, an offset at or above the lowest position."""

    def bound(bounds: Mapping[int, bytes], column: str) -> Any:
        field = table.schema().find_field(column)
        assert isinstance(field.field_type, PrimitiveType)
        return from_bytes(field.field_type, bounds[field.field_id])

    try:
        low, high = ([bound(b, c) for c in COORDINATES] for b in (file.lower_bounds, file.upper_bounds))
    except KeyError:
        return False
    held = [key for key in lowest if low[0] <= key[0] <= high[0] and low[1] <= key[1] <= high[1]]
    return bool(held) and all(lowest[key] > high[2] for key in held)
