"""Blocking checks: declared rules, run in DuckDB on the staged Parquet files, before the commit that would publish them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa
from pyiceberg.manifest import DataFile, DataFileContent

from lakehouse.declarations import Declaration
from lakehouse.errors import ChecksFailed
from lakehouse.queries import staged_sql


@dataclass(frozen=True)
class CheckResult:
    """One check over some rows: how many break it."""

    name: str
    violations: int


def check_expressions(declared: Declaration) -> dict[str, str]:
    """Every rule of a declaration as {name: SQL expression counting the rows that break it}, over one relation."""
    key = ", ".join(f'"{c}"' for c in declared.primary_key)
    rules = {_unique(declared.primary_key): f"count(*) - count(DISTINCT ({key}))"}
    for column in declared.columns:
        if column.required or column.name in declared.primary_key:
            rules[f"not_null({column.name})"] = f'count(*) FILTER (WHERE "{column.name}" IS NULL)'
        if column.accepted is not None:
            values = ", ".join("'" + v.replace("'", "''") + "'" for v in column.accepted)
            rules[f"accepted({column.name})"] = f'count(*) FILTER (WHERE "{column.name}" NOT IN ({values}))'
    for check in declared.checks:
        rules[check.name] = f"count(*) FILTER (WHERE ({check.sql}) IS NOT TRUE)"
    return rules


def _unique(key: Sequence[str]) -> str:
    columns = ", ".join(f'"{c}"' for c in key)
    return f"unique({columns})"


def run_checks(
    connection: duckdb.DuckDBPyConnection, declared: Declaration, relation: str, proven: Sequence[str] = ()
) -> list[CheckResult]:
    """Run every rule of the declaration, but those proven, over `relation` (an SQL table expression) in one pass."""
    rules = {name: rule for name, rule in check_expressions(declared).items() if name not in proven}
    counts = connection.execute(f"SELECT {', '.join(rules.values())} FROM {relation}").fetchone()
    assert counts is not None
    return [CheckResult(name, int(count)) for name, count in zip(rules, counts, strict=True)]


def check_staged(connection: duckdb.DuckDBPyConnection, declared: Declaration, files: Sequence[DataFile]) -> None:
    """Refuse staged files that break a declared rule.

    Raises:
        ChecksFailed: naming each rule broken and the number of rows; the batch is held, and advances nothing.
    """
    if rows := [f.file_path for f in files if f.content == DataFileContent.DATA]:
        _refuse_broken(declared, run_checks(connection, declared, staged_sql(rows)))


def check_rows(
    connection: duckdb.DuckDBPyConnection, declared: Declaration, rows: pa.Table, *, unique: Sequence[str] = ()
) -> None:
    """Refuse rows that break a declared rule, before they are written: what `check_staged` does without reading files again.

    unique: a key that is known to be unique over all rows of the batch, of which these may be a part.

    Raises:
        ChecksFailed: as `check_staged`.
    """
    connection.register("checked_rows", rows)
    try:
        _refuse_broken(declared, run_checks(connection, declared, "checked_rows", proven=[_unique(unique)]))
    finally:
        connection.unregister("checked_rows")


def _refuse_broken(declared: Declaration, results: Sequence[CheckResult]) -> None:
    if broken := [r for r in results if r.violations]:
        detail = "; ".join(f"{r.name}: {r.violations} rows" for r in broken)
        raise ChecksFailed(f"{declared.table}: the batch was held, nothing was committed: {detail}. Rules: {declared.path}")
