"""The consistent cut: how far the inputs of a table have all come, and how much of that one batch takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyiceberg.table import Table

from lakehouse.errors import Retryable
from lakehouse.lake import Lake, newest_within, snapshot_vector
from lakehouse.positions import TopicPartition, Vector, vector_of
from lakehouse.transforms import Transform, upstream


def consistent_cut(
    lake: Lake, names: Sequence[str], transforms: Mapping[str, Transform]
) -> tuple[dict[TopicPartition, int], dict[str, tuple[Table, int | None]]]:
    """The lowest positions common to the inputs, and for each input the newest snapshot that does not pass them.

    Each topic belongs to the raw table that consumes it; an input counts for the topics of the raw tables it derives from.

    Raises:
        Retryable: an input has no snapshot at the cut (expired, or another input has not been built yet).
    """
    tables = {name: lake.open_for_write(name) for name in names}
    roots = {name: raw_roots(lake, name, transforms) for name in names}
    at = {name: (table.current_snapshot(), vector_of(table.metadata, name)) for name, table in tables.items()}
    topics = {raw: at[raw][1] if raw in at else lake.vector(raw) for raw in sorted(set().union(*roots.values()))}
    while True:
        cut = {
            key: min(at[name][1].get(key, 0) for name in names if raw in roots[name])
            for raw, keys in topics.items()
            for key in keys
        }
        # a raw table is read by offset range, so it can be ahead; what derives from it must be as it was at the cut
        ahead = [n for n in names if not n.startswith("raw.") and any(v > cut.get(k, v) for k, v in at[n][1].items())]
        if not ahead:
            return cut, {name: (tables[name], s.snapshot_id if s else None) for name, (s, _) in at.items()}
        for name in ahead:
            snapshot = newest_within(tables[name], name, {k: cut[k] for k in at[name][1] if k in cut})
            if snapshot is None:
                others = ", ".join(n for n in names if n != name)
                raise Retryable(
                    f"{name} is ahead of the other inputs ({others}) and keeps no snapshot at their cut; run those first"
                )
            # it may be below the cut: then the cut is lower than was thought, and the others have to follow
            at[name] = (snapshot, snapshot_vector(snapshot, name))


def raw_roots(lake: Lake, name: str, transforms: Mapping[str, Transform]) -> set[str]:
    """The raw tables that a table derives from (a raw table: itself)."""
    if name not in transforms:
        return {name} if name.startswith("raw.") else set()
    sources = upstream(lake.declaration(name), transforms[name])
    return set().union(*(raw_roots(lake, source, transforms) for source in sources))


def bounded(expected: Vector, cut: Vector, topics: set[str], rows: int) -> tuple[dict[TopicPartition, int], bool]:
    """At most about `rows` offsets of `topics` beyond `expected`, spread over partitions; and whether that reaches the cut."""
    behind = {k: cut[k] - expected.get(k, 0) for k in cut if k[0] in topics and cut[k] > expected.get(k, 0)}
    total = sum(behind.values())
    if total <= rows:
        return dict(cut), True
    return {k: expected.get(k, 0) + -(-behind[k] * rows // total) if k in behind else cut[k] for k in cut}, False
