"""Audits: a table's answers derived a second time for a random sample of its rows, and compared.

An audit is a folder's NAME.yaml (what is sampled and compared) and NAME.sql, a query that has the sample as `audit.sample` and
reads the lake's tables beside it. It shares no code with the table's transform, so a mistake in one shows as a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import polars as pl
import yaml

from lakehouse import metrics
from lakehouse.coordinates import COORDINATES
from lakehouse.declarations import Declaration
from lakehouse.errors import ChecksFailed, DeclarationError, UsageError
from lakehouse.lake import Lake
from lakehouse.outages import reaching
from lakehouse.plans import frame
from lakehouse.queries import bind_lake, bind_reference, bind_sql, connect, quote, tables_read

SAMPLE = "audit.sample"
EXAMPLES = 10


class Audit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """NAME.yaml; what each field means is written there."""

    table: str
    about: str
    time: str
    outcome: str
    given: list[str]
    compared: list[str]


class Outcome(msgspec.Struct, frozen=True):
    """One value of the outcome: rows of the window that have it and their share of all, how many were sampled and agree."""

    rows: int
    share: float
    checked: int
    agree: int


class Audited(msgspec.Struct, frozen=True):
    """What an audit found. since, until: the window [since, until), None open. share: of the rows checked, those that agree.

    examples: of rows that disagree their coordinates, and by column what is stored and what was derived; of a column that holds
    personal data only its name.
    """

    audit: str
    table: str
    since: datetime | None
    until: datetime | None
    seed: int
    checked: int
    agree: int
    share: float
    outcomes: dict[str, Outcome]
    examples: list[dict[str, Any]]


def audits(folder: Path) -> dict[str, Audit]:
    """The audits of a folder by name.

    Raises:
        DeclarationError: one is not as `Audit` says, or has no query.
    """
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            found[path.stem] = msgspec.convert(yaml.safe_load(path.read_text("utf-8")), Audit)
        except (msgspec.ValidationError, yaml.YAMLError) as error:
            raise DeclarationError(f"{path}: {error}") from None
        if not path.with_suffix(".sql").exists():
            raise DeclarationError(f"{path}: its query {path.stem}.sql is not there")
    return found


def audit(
    lake: Lake,
    name: str,
    *,
    sample: int,
    seed: int = 0,
    since: datetime | None = None,
    until: datetime | None = None,
    days: int | None = None,
    as_of: datetime | int | None = None,
) -> Audited:
    """Derive `sample` random rows of a window again and compare; the metrics of this process then say what was found.

    days: instead of a window, the last ones up to the newest row. as_of: look at all tables as they were then.

    Raises:
        UsageError: no such audit, or no rows in the window.
    """
    declared = audits(lake.settings.audits_dir)
    if name not in declared:
        raise UsageError(f"there is no audit {name!r}; there are: {', '.join(declared)}")
    asked = declared[name]
    table = lake.declaration(asked.table)
    text = (lake.settings.audits_dir / f"{name}.sql").read_text("utf-8")
    sources = [t for t in tables_read(text) if t != SAMPLE]
    with connect(lake.settings) as connection, reaching("reading the lake"):
        bind_reference(connection, lake.settings.catalog_dir, sources)
        bind_lake(connection, lake, {asked.table, *(t for t in sources if t in lake.declarations)}, as_of)
        if days is not None:
            newest = connection.execute(f'SELECT max("{asked.time}") FROM {quote(asked.table)}').fetchall()[0][0]
            since = newest and newest - timedelta(days=days)
        counts = _pick(connection, asked, table, sample, seed, (since, until))
        if not counts:
            raise UsageError(f"{asked.table} has no rows in this window: there is nothing to audit")
        stored, derived = _derive(connection, asked, table, text)
    compared = _compare(stored, derived, table.primary_key, asked.compared)
    right = dict(compared.filter("agrees").group_by(asked.outcome).len().iter_rows())
    checked = dict(compared.group_by(asked.outcome).len().iter_rows())
    whole = sum(counts.values())
    outcomes = {o: Outcome(n, n / whole, checked.get(o, 0), right.get(o, 0)) for o, n in counts.items()}
    agree = sum(right.values())
    wrong = compared.filter(~pl.col("agrees")).head(EXAMPLES)
    examples = [_tell(row, table, asked.compared) for row in wrong.iter_rows(named=True)]
    done = Audited(name, asked.table, since, until, seed, compared.height, agree, agree / compared.height, outcomes, examples)
    metrics.audited(name, done.share, done.checked, {o: v.share for o, v in outcomes.items()})
    return done


def refuse_disagreement(found: Audited, at_least: float) -> None:
    """Raise ChecksFailed if a smaller share than `at_least` of the rows checked agrees."""
    if found.share < at_least:
        raise ChecksFailed(
            f"{found.table}: {found.agree:,} of {found.checked:,} rows agree; see: lakehouse audit {found.audit} "
            f"--seed {found.seed} (a share of at least {at_least} was asked for)"
        )


def _pick(
    connection: duckdb.DuckDBPyConnection,
    asked: Audit,
    table: Declaration,
    sample: int,
    seed: int,
    window: tuple[datetime | None, datetime | None],
) -> dict[str, int]:
    """Make the relation `picked`, a random sample of the window's rows; rows of the window by outcome, the declared ones first.

    Which rows are picked depends on their keys and the seed alone.
    """
    names = [*table.primary_key, *asked.given, *asked.compared, *(c for c in COORDINATES if c in table.column_names)]
    columns = ", ".join(f'"{c}"' for c in dict.fromkeys(names))
    key = ", ".join(f'"{c}"' for c in table.primary_key)
    bounds = dict(zip(("since", "until"), window, strict=True))
    where = " AND ".join(f'"{asked.time}" {op} ${b}' for b, op in (("since", ">="), ("until", "<")) if bounds[b]) or "true"
    given = {b: at for b, at in bounds.items() if at}
    connection.execute(
        f"""
        CREATE TEMP TABLE picked AS SELECT {columns} FROM {quote(asked.table)} WHERE {where}
        ORDER BY hash({key}, $seed), {key} LIMIT $sample
        """,
        given | {"seed": seed, "sample": sample},
    )
    counted = connection.execute(
        f'SELECT "{asked.outcome}", count(*) FROM {quote(asked.table)} WHERE {where} GROUP BY ALL ORDER BY ALL', given
    ).fetchall()
    known = next(c.accepted for c in table.columns if c.name == asked.outcome) or []
    return dict.fromkeys(known, 0) | {str(outcome): rows for outcome, rows in counted} if counted else {}


def _derive(
    connection: duckdb.DuckDBPyConnection, asked: Audit, table: Declaration, text: str
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows picked as they are stored, and what the query says of them."""
    columns = ", ".join(f'"{c}"' for c in dict.fromkeys([*table.primary_key, *asked.given]))
    bind_sql(connection, SAMPLE, f"(SELECT {columns} FROM picked)")
    return frame(connection, "FROM picked"), frame(connection, text)


def _compare(stored: pl.DataFrame, derived: pl.DataFrame, key: Sequence[str], columns: Sequence[str]) -> pl.DataFrame:
    """The stored rows with `agrees`, and each column as derived under `derived COLUMN`.

    A row that is derived not at all, or more than once, does not agree.
    """
    once = derived.select(*key, *columns).unique(key, keep="none").with_columns(found=pl.lit(value=True))
    both = stored.join(once.rename({c: f"derived {c}" for c in columns}), on=list(key), how="left")
    same = pl.all_horizontal([pl.col(c).eq_missing(pl.col(f"derived {c}")) for c in columns])
    return both.with_columns(agrees=same & pl.col("found").fill_null(value=False)).sort(key)


def _tell(row: Mapping[str, Any], table: Declaration, columns: Sequence[str]) -> dict[str, Any]:
    """One row that disagrees, without what is personal."""
    free = {c.name for c in table.columns if c.pii == "none"}
    where = {c: row[c] for c in COORDINATES if c in row}
    if not row["found"]:
        return where | {"differs": {}, "derived": False}
    differs = {c: {"stored": row[c], "derived": row[f"derived {c}"]} for c in columns if row[c] != row[f"derived {c}"]}
    return where | {"differs": {c: told if c in free else {} for c, told in differs.items()}, "derived": True}
