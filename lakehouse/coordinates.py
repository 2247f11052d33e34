"""Rows of a table by their coordinates (topic, partition, offset): what is new for a consumer is a range of offsets.

Such a range survives compaction and expiry, and means the same rows each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import duckdb
import pyarrow as pa
from pyiceberg.table import Table

from lakehouse.live import files_where
from lakehouse.positions import TopicPartition, Vector
from lakehouse.predicates import all_of, any_of, at_least, below, equal
from lakehouse.queries import empty_sql, files_sql, text

COORDINATES = ["topic", "partition", "offset"]
"""Where a record lies in Kafka: what names it in every table that carries them."""

GAP = 50_000  # offsets: coordinates further apart than this are looked for as two ranges


def ranges_sql(table: Table, snapshot: int | None, ranges: Mapping[TopicPartition, tuple[int, int]]) -> str:
    """Rows of a table that carries coordinates, for half-open offset ranges {(topic, partition): (from, to)}, as SQL.

    Iceberg's statistics choose the files, so the cost is that of the ranges and not of the table.
    """
    return _spans_sql(table, snapshot, [(*key, *span) for key, span in sorted(ranges.items())])


def coordinates_sql(connection: duckdb.DuckDBPyConnection, table: Table, snapshot: int | None, coordinates: pa.Table) -> str:
    """Rows of a table that carries coordinates, at exactly these (columns topic, partition, offset), as SQL.

    The relation `__coordinates` of the connection holds them. Only files that may hold one of them are read.
    """
    spans: list[tuple[str, int, int, int]] = []
    for topic, partition, offset in sorted(zip(*(coordinates.column(c).to_pylist() for c in COORDINATES), strict=True)):
        last = spans[-1] if spans else None
        if last and last[:2] == (topic, partition) and offset - last[3] < GAP:
            spans[-1] = (*last[:3], offset + 1)
        else:
            spans.append((topic, partition, offset, offset + 1))
    connection.register("__coordinates", coordinates.select(COORDINATES))
    return f'(SELECT * FROM {_spans_sql(table, snapshot, spans)} SEMI JOIN __coordinates USING (topic, partition, "offset"))'


def below_sql(reached: Vector) -> str:
    """SQL: the row's coordinates lie below the positions reached."""
    spans = (f'(topic = {text(t)} AND partition = {p} AND "offset" < {end})' for (t, p), end in sorted(reached.items()))
    return f"({' OR '.join(spans) or 'false'})"


def _spans_sql(table: Table, snapshot: int | None, spans: Sequence[tuple[str, int, int, int]]) -> str:
    """Rows whose coordinates lie in one of the half-open spans (topic, partition, from, to)."""
    wanted = any_of(
        all_of((equal("topic", topic), equal("partition", partition), at_least("offset", start), below("offset", end)))
        for topic, partition, start, end in spans
    )
    files = files_where(table, wanted, snapshot) if spans else []
    if not files:
        return empty_sql(table)
    inside = " OR ".join(
        f'(topic = {text(topic)} AND partition = {partition} AND "offset" >= {start} AND "offset" < {end})'
        for topic, partition, start, end in spans
    )
    columns = ", ".join(f'"{f.name}"' for f in table.schema().fields)
    return f"(SELECT {columns} FROM {files_sql(table, files)} WHERE {inside})"
