"""Explain: from one row of a table to the rows its figures are made of, and from those to the raw records, byte by byte.

A declaration says under `explain` which rows of which table a figure comes from, and what it is of them. Here they are looked up
in the snapshots that the table was made from, the figure is worked out again and compared, and some of the rows are explained in
turn, until one carries coordinates (topic, partition, offset): then its record is found in raw, with its file and snapshot.

Columns of class `personal` and `restricted` are withheld unless they are asked for; who can ask is who may read the lake's files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import duckdb
import sqlglot
from pyiceberg.table import Table
from sqlglot import exp

from lakehouse.completeness import Standing, said, standings
from lakehouse.coordinates import COORDINATES
from lakehouse.cuts import raw_roots
from lakehouse.declarations import Declaration, Explained
from lakehouse.errors import UsageError
from lakehouse.lake import Lake, history, snapshot_inputs
from lakehouse.live import files_where
from lakehouse.outages import reaching
from lakehouse.predicates import all_of, equal
from lakehouse.queries import (
    bind_reference,
    bind_table,
    connect,
    fetch,
    files_sql,
    parameters_of,
    path_for_duckdb,
    quote,
    tables_read,
)
from lakehouse.transforms import load_transforms

Row = dict[str, Any]
WITHHELD = "(withheld)"
MASKED = ("personal", "restricted")


@dataclass(frozen=True)
class Figure:
    """One measure: what the row says, what the rows it is made of add up to, and whether that is the same."""

    measure: str
    row: Any
    found: Any
    agrees: bool


@dataclass(frozen=True)
class Record:
    """A raw record: where it stands, since which snapshot, its payload's size and SHA-256, and the payload if asked for."""

    table: str
    topic: str
    partition: int
    offset: int
    received_at: datetime | None = None
    file: str | None = None
    snapshot_id: int | None = None
    committed_at: datetime | None = None
    columns: Row = field(default_factory=dict)
    payload_bytes: int | None = None
    payload_sha256: str | None = None
    payload: str | bytes | None = None
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """One of the rows that a figure is made of, and what is behind it."""

    row: Row
    record: Record | None = None
    steps: Sequence[Step] = ()


@dataclass(frozen=True)
class Step:
    """The rows of one source behind a row: how many, what they add up to, and the first of them."""

    source: str
    why: str
    snapshot_id: int | None
    rows: int
    figures: Sequence[Figure]
    entries: Sequence[Entry]
    note: str = ""


@dataclass(frozen=True)
class Explanation:
    """A row explained. complete: of a table by day, whether nothing that belongs to the row is awaited any more."""

    table: str
    snapshot_id: int | None
    row: Row
    steps: Sequence[Step]
    standing: Standing
    complete: bool | None = None

    @property
    def differences(self) -> list[str]:
        """Figures that do not add up, here or further down."""
        return [text for step in self.steps for text in _differences(self.table, step)]


def _differences(table: str, step: Step) -> list[str]:
    own = [f"{table}.{f.measure} is {f.row}, its rows of {step.source} make {f.found}" for f in step.figures if not f.agrees]
    return own + [text for e in step.entries for s in e.steps for text in _differences(step.source, s)]


def explain(
    lake: Lake, name: str, where: str, measure: str | None = None, entries: int = 2, *, withheld: bool = True
) -> Explanation:
    """Explain the one row of a table for which `where` is true, or one measure of it.

    entries: how many of the rows behind a figure are followed further, at each step. withheld: keep personal and restricted
    columns back.

    Raises:
        UsageError: the table says nothing of where its figures come from; no row, or several, are meant; no such measure.
    """
    declared = lake.declaration(name)
    if not declared.explain:
        able = ", ".join(n for n, d in lake.declarations.items() if d.explain)
        raise UsageError(f"{name} does not declare what its rows are made of (`explain`); tables that do: {able}")
    measures = [m for e in declared.explain for m in e.measures]
    if measure is not None and measure not in measures:
        raise UsageError(f"{name} does not explain {measure!r}; what it explains: {', '.join(measures)}")
    told = standings(lake, [name], load_transforms(lake.settings.transforms_dir, lake.declarations))[name]
    table = lake.load(name)
    made = _made(table)
    row = _the_row(lake, declared, table, where, told)
    steps = _Walk(lake, entries, withheld).steps(declared, row, made, measure)
    return Explanation(
        name,
        made.snapshot_id,
        _shown(declared, row, withheld),
        steps,
        told,
        row.get("complete"),
    )


@dataclass(frozen=True)
class _Made:
    """What a table's current snapshot was made from."""

    snapshot_id: int | None
    inputs: Mapping[str, int]


def _made(table: Table) -> _Made:
    current = table.current_snapshot()
    inputs = next((found for s in history(table) if (found := snapshot_inputs(s))), {})  # compaction names none
    return _Made(current.snapshot_id if current else None, inputs)


def _the_row(lake: Lake, declared: Declaration, table: Table, where: str, told: Standing) -> Row:
    """The one row that is meant."""
    try:
        parsed = sqlglot.parse_one(f"SELECT 1 FROM t WHERE ({where})", dialect="duckdb")
    except sqlglot.errors.SqlglotError as error:
        raise UsageError(f"--where {where!r} is no condition: {str(error).splitlines()[0]}") from None
    if tuple(parsed.find_all(exp.Subquery, exp.Placeholder)) or len(list(parsed.find_all(exp.Select))) > 1:
        raise UsageError(f"--where {where!r}: a condition on the columns of {declared.table} alone")
    with connect(lake.settings) as connection:
        current = table.current_snapshot()
        bind_table(connection, declared.table, table, current.snapshot_id if current else None)
        found = _rows(connection, f"SELECT * FROM {quote(declared.table)} WHERE ({where}) LIMIT 20")
    if len(found) == 1:
        return found[0]
    key = ", ".join(declared.primary_key)
    if not found:
        until = f"; {said(told)}" if told.complete_until else ""
        raise UsageError(f"{declared.table} has no row with {where}{until}. Its key: {key}")
    examples = "\n  ".join(" AND ".join(f"{k} = {_literal(row[k])}" for k in declared.primary_key) for row in found[:5])
    raise UsageError(
        f"--where means {'20 or more' if len(found) == 20 else len(found)} rows; name one by its key ({key}):\n  {examples}"
    )


def _literal(value: Any) -> str:
    if isinstance(value, date | datetime):
        return f"{'TIMESTAMPTZ' if isinstance(value, datetime) else 'DATE'} '{value}'"
    return str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"


def _rows(connection: duckdb.DuckDBPyConnection, sql: str, parameters: Row | None = None) -> list[Row]:
    try:
        with reaching("reading the lake"):
            return fetch(connection, sql, parameters).to_pylist()  # type: ignore[no-any-return]
    except duckdb.Error as error:
        raise UsageError(f"SQL error: {error}") from None


@dataclass(frozen=True)
class _Walk:
    """One explanation on its way: how many rows are followed at each step, and whether columns are withheld."""

    lake: Lake
    entries: int
    withheld: bool

    def steps(self, declared: Declaration, row: Row, made: _Made, measure: str | None = None) -> list[Step]:
        """What the declaration says of where a row comes from, one step each; only what has the measure, if one is named."""
        wanted = [e for e in declared.explain if measure is None or measure in e.measures]
        return [self._step(declared, e, row, made, measure) for e in wanted]

    def _step(self, declared: Declaration, explained: Explained, row: Row, made: _Made, measure: str | None) -> Step:
        source = self.lake.declaration(explained.source)
        measures = {m: sql for m, sql in explained.measures.items() if measure in (None, m)}
        also = "".join(f", ({sql}) AS {name}" for name, sql in explained.also.items())
        within = f"(SELECT entry.*{also} FROM {explained.source} AS entry WHERE {explained.where}) AS entry{_only(measures)}"
        totals = f"SELECT {', '.join(['count(*) AS __rows', *(f'{sql} AS {m}' for m, sql in measures.items())])} FROM {within}"
        listed = f"SELECT * FROM {within} ORDER BY {', '.join(source.primary_key)} LIMIT {self.entries}"
        with connect(self.lake.settings) as connection:
            names = tables_read(totals)
            bind_reference(connection, self.lake.settings.catalog_dir, names)
            pinned = {n: self._bind(connection, n, declared, made) for n in names if n in self.lake.declarations}
            total = _rows(connection, totals, _parameters(totals, row))[0]
            found = _rows(connection, listed, _parameters(listed, row))
        snapshot, table, gone = pinned[explained.source]
        return Step(
            source.table,
            explained.why,
            snapshot,
            total["__rows"],
            [_figure(m, row[m], total[m]) for m in measures],
            [self._entry(source, table, entry) for entry in found],
            "the snapshot that this was made from has expired: looked up in the present one" if gone else "",
        )

    def _bind(
        self, connection: duckdb.DuckDBPyConnection, name: str, declared: Declaration, made: _Made
    ) -> tuple[int | None, Table, bool]:
        """Bind a table as it was when the row was made: (its snapshot, the table, has that snapshot expired)."""
        table = self.lake.load(name)
        current = table.current_snapshot()
        snapshot = made.snapshot_id if name == declared.table else made.inputs.get(name)
        gone = snapshot is not None and table.snapshot_by_id(snapshot) is None
        if snapshot is None or gone:
            snapshot = current.snapshot_id if current else None
        bind_table(connection, name, table, snapshot)
        return snapshot, table, gone

    def _entry(self, source: Declaration, table: Table, row: Row) -> Entry:
        shown = _shown(source, row, self.withheld)
        if all(row.get(c) is not None for c in COORDINATES):
            return Entry(shown, record=self._record(source.table, row))
        return Entry(shown, steps=self.steps(source, row, _made(table)))

    def _record(self, source: str, row: Row) -> Record:
        """The raw record at the coordinates of a row."""
        topic, partition, offset = (row[c] for c in COORDINATES)
        transforms = load_transforms(self.lake.settings.transforms_dir, self.lake.declarations)
        roots = sorted(raw_roots(self.lake, source, transforms))
        name = next((n for n in roots if (topic, partition) in self.lake.vector(n)), roots[0])
        declared, table = self.lake.declaration(name), self.lake.load(name)
        here = all_of((equal("topic", topic), equal("partition", partition), equal("offset", offset)))
        candidates = files_where(table, here)
        found: list[Row] = []
        if candidates:
            at = 'topic = $topic AND "partition" = $partition AND "offset" = $offset'
            with connect(self.lake.settings) as connection:
                wanted = f"SELECT * FROM {files_sql(table, candidates)} WHERE {at}"
                found = _rows(connection, wanted, {c: row[c] for c in COORDINATES})
        if not found:
            kept = f" (it keeps {declared.retention_days} days)" if declared.retention_days else ""
            return Record(name, topic, partition, offset, note=f"{name} holds it no longer{kept}")
        record = found[0]
        file = next(f for f in candidates if path_for_duckdb(f.file_path) == record["filename"])
        snapshot = table.snapshot_by_id(file.added_by) if file.added_by is not None else None
        payload: bytes | None = record.get("payload")
        rest = _shown(declared, {c: v for c, v in record.items() if c in declared.column_names}, self.withheld)
        return Record(
            name,
            topic,
            partition,
            offset,
            record["received_at"],
            file.file_path,
            file.added_by,
            datetime.fromtimestamp(snapshot.timestamp_ms / 1000, UTC) if snapshot else None,
            {k: v for k, v in rest.items() if k not in (*COORDINATES, "received_at", "payload")},
            len(payload) if payload is not None else None,
            hashlib.sha256(payload).hexdigest() if payload is not None else None,
            rest.get("payload"),
            "" if snapshot else "the snapshot that brought the file has expired",
        )


def _only(measures: Mapping[str, str]) -> str:
    """Of one measure that counts only rows of a `FILTER`, those: the others would be listed for nothing."""
    if len(measures) != 1:
        return ""
    tree = sqlglot.parse_one(f"SELECT {next(iter(measures.values()))}", dialect="duckdb")
    conditions = [f.expression.this.sql(dialect="duckdb") for f in tree.find_all(exp.Filter)]
    return f" WHERE {' OR '.join(f'({c})' for c in conditions)}" if conditions else ""


def _parameters(sql: str, row: Row) -> Row:
    """Of a row what a query names."""
    return {name: row[name] for name in parameters_of(sql)}


def _figure(measure: str, row: Any, found: Any) -> Figure:
    """Compare; no rows add up to 0, and of ratios the last bits depend on the order in which they are worked out."""
    if isinstance(found, Decimal):  # DuckDB's sum of integers is wider than they are
        found = int(found)
    if found is None and row == 0:
        found = 0
    same = math.isclose(row, found, rel_tol=1e-12) if isinstance(row, float) and isinstance(found, float) else row == found
    return Figure(measure, row, found, same)


def _shown(declared: Declaration, row: Row, withheld: bool) -> Row:
    """A row without what is withheld; what is NULL is no secret."""
    secret = {c.name for c in declared.columns if c.pii in MASKED} if withheld else set()
    return {k: WITHHELD if k in secret and v is not None else v for k, v in row.items()}
