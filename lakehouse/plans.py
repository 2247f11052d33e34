"""A plan: what is to be done for one table, from the state it starts from to the positions to reach; and what came of it.

A transform that plans its own files (`plan(plan) -> Staged`) works with what is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import TypeAlias

import duckdb
import polars as pl
import pyarrow as pa
from pyiceberg.expressions import BooleanExpression
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from lakehouse.commit import Scope
from lakehouse.completeness import complete_until
from lakehouse.coordinates import COORDINATES, below_sql, coordinates_sql, ranges_sql
from lakehouse.dead_letters import write_dead_letters
from lakehouse.declarations import Declaration
from lakehouse.lake import Lake
from lakehouse.live import LiveFile, files_where
from lakehouse.positions import TopicPartition
from lakehouse.predicates import all_of, at_least, below
from lakehouse.queries import bind_table, empty_sql, fetch, files_sql, quote
from lakehouse.staging import conform, stage
from lakehouse.transforms import Inputs, Transform

Pinned: TypeAlias = Mapping[str, tuple[Table, int | None]]
"""The inputs of a table, each at a snapshot (None: it held nothing)."""


@dataclass(frozen=True)
class Plan:
    """What is to be done for one table: the state it starts from, its inputs at the cut, and the offsets to reach."""

    lake: Lake
    declared: Declaration
    transform: Transform
    table: Table
    base: int | None
    expected: dict[TopicPartition, int]
    reached: dict[TopicPartition, int]
    pinned: Pinned
    connection: duckdb.DuckDBPyConnection
    caught_up: bool
    again: pa.Table | None = None
    """Coordinates (topic, partition, offset) of raw records to take up again, below the positions (lakehouse/replay.py)."""
    refused: list[pa.Table] = field(default_factory=list)

    @property
    def id_indexes(self) -> Path:
        """Where the indexes of ids are (lakehouse/ids.py)."""
        return self.lake.settings.home / "cache" / "ids"

    def inputs(self) -> Inputs:
        """The inputs as the transform sees them."""
        known: dict[str, date] = {}
        if "complete_until" in self.transform.parameters:
            known["complete_until"] = complete_until(self.lake, self.declared, self.reached)
        return Inputs(self.connection, self.lake.settings.catalog_dir, known)

    def bind(self, names: Iterable[str]) -> None:
        """Bind input tables, at the cut, to their names."""
        for name in names:
            bind_table(self.connection, name, *self.pinned[name])

    def bind_own(self) -> None:
        """Bind the table itself, as it was when the plan began, to its name."""
        bind_table(self.connection, self.declared.table, self.table, self.base)

    def snapshots(self) -> dict[str, int]:
        """The snapshot of each input, as the commit records it."""
        return {name: snapshot for name, (_, snapshot) in self.pinned.items() if snapshot is not None}

    def new_rows_sql(self, name: str) -> str:
        """Rows of an input whose coordinates lie between the positions expected and reached, as an SQL table expression.

        In a replay, instead: its rows at the coordinates that are taken up again.
        """
        table, snapshot = self.pinned[name]
        if self.again is not None:
            return coordinates_sql(self.connection, table, snapshot, self.again)
        ranges = {k: (self.expected.get(k, 0), end) for k, end in self.reached.items() if end > self.expected.get(k, 0)}
        return ranges_sql(table, snapshot, ranges)

    def consumed_sql(self, name: str, column: str, start: datetime, end: datetime) -> str:
        """Rows of an input below the positions reached of which `column` lies in [start, end), as an SQL table expression."""
        table, snapshot = self.pinned[name]
        files = files_where(table, all_of((at_least(column, start), below(column, end))), snapshot)
        if not files:
            return empty_sql(table)
        columns, by = ", ".join(quote(f.name) for f in table.schema().fields), quote(column)
        within = f"{by} >= '{start.isoformat()}' AND {by} < '{end.isoformat()}'"
        return f"(SELECT {columns} FROM {files_sql(table, files)} WHERE {within} AND {below_sql(self.reached)})"

    def reject(self, refused: pa.Table | None) -> int:
        """Keep the records that the transform cannot use as dead letters, before the rows; returns how many are new.

        In a replay they have their letters already: what is said of them now is kept for the end of it.
        """
        if refused is None or refused.num_rows == 0:
            return 0
        if self.again is not None:
            rows = pl.DataFrame(refused)
            again = pl.DataFrame(self.again.select(COORDINATES))
            self.refused.append(rows.join(again, on=COORDINATES, how="semi").to_arrow())
            refused = rows.join(again, on=COORDINATES, how="anti").to_arrow()
        return write_dead_letters(self.lake, self.declared.table, refused)

    def new_rows(self, name: str, columns: str) -> pa.Table:
        """The same rows in memory; `columns` is an SQL select list."""
        return fetch(self.connection, f"SELECT {columns} FROM {self.new_rows_sql(name)}")


@dataclass(frozen=True)
class Staged:
    """The files of one plan, ready to be committed: added, removed, where the rewrite must have been alone; what to note."""

    add: Sequence[DataFile]
    remove: Sequence[DataFile] = ()
    scope: Scope = "table"
    new_input_rows: int = 0
    rows: int = 0
    rejected: int = 0
    note: Mapping[str, str] = field(default_factory=dict)


def live_files(plan: Plan, where: BooleanExpression) -> list[LiveFile]:
    """Files of the plan's base that may hold rows of which `where` is true, by partition and statistics."""
    return files_where(plan.table, where, plan.base)


def other_rows(plan: Plan, files: Sequence[DataFile], keys: str, using: str) -> pa.Table:
    """The rows of `files` that have none of the keys (a relation): what a rewrite of these files must keep."""
    columns = ", ".join(f'"{c}"' for c in plan.declared.column_names)
    held = files_sql(plan.table, files)
    return fetch(plan.connection, f"SELECT {columns} FROM {held} ANTI JOIN {keys} USING ({using})")


STAGED_ROWS = 1_000_000
"""Rows that are staged at once when they come piece by piece: each piece by itself would make a small file for each partition."""


@dataclass
class Gathered:
    """Rows of a plan that come piece by piece, and the files made of them."""

    plan: Plan
    _rows: list[pa.Table] = field(default_factory=list)
    _files: list[DataFile] = field(default_factory=list)

    def put(self, *pieces: pa.Table | None) -> None:
        """Take rows; None is none."""
        self._rows += [conform(self.plan.table, piece) for piece in pieces if piece is not None]
        if sum(piece.num_rows for piece in self._rows) >= STAGED_ROWS:
            self._stage()

    def files(self) -> list[DataFile]:
        """The files of all that was put; they belong to no snapshot."""
        self._stage()
        return self._files

    def _stage(self) -> None:
        if self._rows:
            self._files += stage(self.plan.table, self.plan.declared, pa.concat_tables(self._rows))
        self._rows = []


def stage_with(plan: Plan, rows: pa.Table, kept: pa.Table | None) -> list[DataFile]:
    """Stage `rows` together with the rows kept of the files that they replace."""
    content = rows if kept is None else pa.concat_tables([conform(plan.table, kept), conform(plan.table, rows)])
    return stage(plan.table, plan.declared, content)


def count_rows(connection: duckdb.DuckDBPyConnection, relation: str) -> int:
    """How many rows a relation has."""
    return int(connection.execute(f"SELECT count(*) FROM {relation}").fetchall()[0][0])


def frame(connection: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, object] | None = None) -> pl.DataFrame:
    """The rows of a query as a frame."""
    return pl.DataFrame(fetch(connection, sql, parameters))
