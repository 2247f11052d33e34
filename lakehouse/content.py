"""What a table holds as one number: a hash of its rows, whatever their order and the files they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
from pyiceberg.table import Table

from lakehouse.live import files_where
from lakehouse.queries import empty_sql, files_sql, quote


@dataclass(frozen=True)
class Content:
    """How many rows, and 128 bits that are the sum of the rows' own hashes: contents of parts add up to that of the whole."""

    rows: int = 0
    low: int = 0
    high: int = 0

    def __add__(self, other: Content) -> Content:
        return Content(self.rows + other.rows, (self.low + other.low) % 2**64, (self.high + other.high) % 2**64)

    @property
    def hash(self) -> str:
        """32 hexadecimal digits."""
        return f"{self.high:016x}{self.low:016x}"


def content_of(connection: duckdb.DuckDBPyConnection, relation: str, columns: Sequence[str]) -> Content:
    """The content of a relation (SQL or a registered name) in these columns, by their names.

    A row's hash is the MD5 of its columns as JSON, so it depends on values alone and not on the engine's version.
    """
    named = ", ".join(f"{quote(c)} := {quote(c)}" for c in sorted(columns))
    row = f"CAST(to_json(struct_pack({named})) AS VARCHAR)"
    found = connection.execute(
        f"SELECT count(*), coalesce(sum(md5_number_lower(r)), 0) % 18446744073709551616, "
        f"coalesce(sum(md5_number_upper(r)), 0) % 18446744073709551616 FROM (SELECT {row} AS r FROM {relation})"
    ).fetchall()
    return Content(*(int(value) for value in found[0]))


def content_at(connection: duckdb.DuckDBPyConnection, table: Table, snapshot_id: int | None) -> Content:
    """The content of a table at a snapshot, in the columns that the table had then."""
    if snapshot_id is None:
        return Content()
    snapshot = table.snapshot_by_id(snapshot_id)
    assert snapshot is not None
    schemas = table.schemas()
    schema = schemas.get(snapshot.schema_id, table.schema()) if snapshot.schema_id is not None else table.schema()
    files = files_where(table, None, snapshot_id)
    relation = files_sql(table, files) if files else empty_sql(table)
    return content_of(connection, relation, [f.name for f in schema.fields])
