"""Compare two tables of figures cell by cell: which rows are missing, unexpected or wrong, and a few of them in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

EXAMPLES = 3
_NEAR = 1e-9  # ratios are doubles; all that is counted or money is exact


@dataclass(frozen=True)
class Compared:
    """Rows that are true, rows that are stored, how many are wrong (also missing or unexpected), and `EXAMPLES` of these."""

    rows: int
    stored: int
    wrong: int
    examples: tuple[str, ...]


def compare(true: pl.DataFrame, stored: pl.DataFrame, key: Sequence[str]) -> Compared:
    """Compare the columns of `true`; `key` names a row in both. A key stored twice is wrong once more."""
    stored = stored.select(true.columns).cast(true.schema)
    once = stored.unique(key, keep="first", maintain_order=True)
    both = true.with_columns(__true=True).join(
        once.with_columns(__stored=True), on=key, how="full", suffix=" stored", nulls_equal=True, coalesce=True
    )
    values = [c for c in true.columns if c not in key]
    differs = {c: _differs(c, true.schema[c]) for c in values}
    found = both.with_columns(
        __missing=pl.col("__stored").is_null(),
        __unexpected=pl.col("__true").is_null(),
        **{f"{c} wrong": d for c, d in differs.items()},
    )
    wrong = found.filter(pl.any_horizontal("__missing", "__unexpected", *(f"{c} wrong" for c in values))).sort(key)
    examples = [_tell(row, key, values) for row in wrong.head(EXAMPLES).to_dicts()]
    doubled = stored.height - once.height
    if doubled and len(examples) < EXAMPLES:
        twice = stored.filter(pl.struct(key).is_duplicated()).select(key).sort(key).row(0, named=True)
        examples.append(f"{_named(twice)}: stored more than once")
    return Compared(true.height, stored.height, wrong.height + doubled, tuple(examples))


def _differs(column: str, dtype: pl.DataType) -> pl.Expr:
    true, stored = pl.col(column), pl.col(f"{column} stored")
    if dtype.is_float():
        return ((true - stored).abs() > _NEAR).fill_null(value=False) | (true.is_null() != stored.is_null())
    return true.ne_missing(stored)


def _named(row: dict[str, object]) -> str:
    return " ".join(f"{column}={value}" for column, value in row.items())


def _tell(row: dict[str, object], key: Sequence[str], values: Sequence[str]) -> str:
    """One wrong row in words: its key, and what is wrong in it."""
    what = "missing" if row["__missing"] else "should not be there" if row["__unexpected"] else ""
    what = what or ", ".join(f"{c} is {row[f'{c} stored']}, truly {row[c]}" for c in values if row[f"{c} wrong"])
    return f"{_named({c: row[c] for c in key})}: {what}"
