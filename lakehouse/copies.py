"""Several copies of one record: which one counts, and whether the others really say something else.

A pure function over a frame. The winner does not depend on the order of the rows or on how they were split into batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import polars as pl
import pyarrow as pa


def first_copies(
    rows: pl.DataFrame, *, keys: Sequence[str], first_by: Sequence[str], content: Sequence[str]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Of the copies of a key the lowest in `first_by` wins; one that contradicts it is a conflict.

    Args:
        rows: any frame. keys: say what is the same record. first_by: the order among its copies; should be unique.
        content: columns that have to agree. Of texts that are JSON objects only what both carry has to be equal: a later
            rendering of the same record may carry more or less.

    Returns:
        The winners, one row a key; and the copies that contradict their winner, with a column `differs`: the names of what
        differs, never the values.
    """
    place = pl.col("__place")
    ordered = rows.sort([*keys, *first_by]).with_columns(pl.int_range(pl.len()).over(list(keys)).alias("__place"))
    winners = ordered.filter(place == 0).drop("__place")
    others = ordered.filter(place > 0).drop("__place")
    if others.is_empty() or not content:
        return winners, no_conflicts(rows)
    pairs = others.join(
        winners.select(*keys, *(pl.col(c).alias(f"__won_{c}") for c in content)),
        on=list(keys),
        how="left",
        nulls_equal=True,
        maintain_order="left",
    )
    same = pl.all_horizontal([pl.col(c).eq_missing(pl.col(f"__won_{c}")) for c in content])
    suspects = pairs.filter(~same)
    differs = [_differences({c: (row[c], row[f"__won_{c}"]) for c in content}) for row in suspects.iter_rows(named=True)]
    conflicts = suspects.with_columns(pl.Series("differs", differs, pl.String)).filter(pl.col("differs") != "")
    return winners, conflicts.select(*rows.columns, "differs")


def of_one_object(
    rows: pl.DataFrame, *, record: Sequence[str], own: str, about: str, first_by: Sequence[str], delivery: Sequence[str]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Of the deliveries of a record that say it is about different things, those that agree with the first count.

    Args:
        rows: any frame; a delivery gives one row in which `own` is true, which says what the record is about, and any others.
        record: names the record. about: the column that has to agree. delivery: names the delivery that a row came from.

    Returns:
        The rows of the deliveries that count; and the own rows of the others, with a column `differs`, as `first_copies`.
    """
    first = rows.filter(pl.col(own)).sort(*first_by).unique(list(record), keep="first")
    told = first.select(*record, pl.col(about).alias("__about"))
    others = rows.filter(pl.col(own)).join(told, on=list(record)).filter(pl.col(about) != pl.col("__about"))
    kept = rows.join(others.select(delivery).unique(), on=list(delivery), how="anti", maintain_order="left")
    return kept, others.select(*rows.columns, pl.lit(about).alias("differs"))


def no_conflicts(rows: pl.DataFrame) -> pl.DataFrame:
    """What `first_copies` says of rows that do not contradict each other: none, with their columns and `differs`."""
    return rows.clear().with_columns(pl.lit(None, pl.String).alias("differs"))


def conflict_letters(conflicts: pl.DataFrame, received_at: str) -> pa.Table:
    """Copies that contradict the one that counts, as dead letters; `detail` names what differs."""
    return conflicts.select(
        "topic",
        "partition",
        "offset",
        pl.col(received_at).alias("received_at"),
        pl.lit("conflicting_copy").alias("reason"),
        (pl.lit("differs from the first receipt in: ") + pl.col("differs")).alias("detail"),
    ).to_arrow()


def _differences(values: Mapping[str, tuple[Any, Any]]) -> str:
    """Names of what two copies contradict each other in, sorted; empty if in nothing."""
    found: set[str] = set()
    for name, (one, other) in values.items():
        a, b = _parsed(one), _parsed(other)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= {k for k in a.keys() & b.keys() if not _agree(a[k], b[k])}
        elif a != b:
            found.add(name)
    return ", ".join(sorted(found))


def _parsed(value: Any) -> Any:
    return msgspec.json.decode(value) if isinstance(value, str) and value.startswith("{") else value


def _agree(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal in all that both carry."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_agree(one[k], other[k]) for k in one.keys() & other.keys())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_agree(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
