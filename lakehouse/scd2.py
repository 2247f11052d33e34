"""SCD2: versions of a key become half-open intervals `[valid_from, valid_to)` of equal tracked values.

A pure function over any frame, independent of Stripe. The semantics are those of Spark's open-sourced AUTO CDC.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from lakehouse.errors import Terminal


def scd2(
    versions: pl.DataFrame,
    *,
    keys: Sequence[str],
    time: str,
    sequence: Sequence[str] = (),
    tracked: Sequence[str],
    untracked: Sequence[str] = (),
    deleted: str | None = None,
) -> pl.DataFrame:
    """The history of each key, whatever the order of the rows.

    Args:
        versions: one row a known state; columns `keys`, `time`, `sequence`, `tracked`, `untracked` and `deleted`.
        keys: identify the thing. time: when the state began. sequence: order among the states of one time, ascending.
        tracked: a change in one of them starts a new interval; NULL equals NULL. untracked: the last value of the interval.
        deleted: boolean column; true closes the key (and wins a tie with an upsert of the same sequence).

    Returns:
        Columns keys, tracked, untracked, valid_from, valid_to (NULL: open), sorted by keys and valid_from. No interval is
        empty: of several states of one time, the last one counts. Equal neighbours are one interval. After a delete there is a
        gap until the key comes back.

    Raises:
        Terminal: a NULL in a key, in `time` or in a sequence column; nothing is returned.
    """
    order = [*keys, time, *sequence]
    for column in order:
        if nulls := versions[column].null_count():
            raise Terminal(f"scd2: {nulls} rows have no {column!r}; keys, time and sequence must not be NULL")
    gone = pl.col(deleted).fill_null(value=False) if deleted else pl.lit(value=False)
    states = (
        versions.with_columns(gone.alias("__gone"))
        # the same key and sequence with other values: any rule will do, as long as it is not the order of the rows
        .sort([*order, "__gone", *tracked, *untracked])
        .unique(subset=[*keys, time], keep="last", maintain_order=True)
    )
    same_key = pl.all_horizontal([pl.col(k).eq_missing(pl.col(k).shift()) for k in keys])
    unchanged = [pl.col(c).eq_missing(pl.col(c).shift()) for c in tracked]
    same_state = (
        pl.when(pl.col("__gone") | pl.col("__gone").shift())
        .then(pl.col("__gone") & pl.col("__gone").shift())
        .otherwise(pl.all_horizontal(unchanged) if unchanged else pl.lit(value=True))
    )
    grouped = states.with_columns((~(same_key & same_state)).fill_null(value=True).cum_sum().alias("__group"))
    intervals = (
        grouped.group_by("__group", maintain_order=True)
        .agg(
            *[pl.col(c).first() for c in (*keys, *tracked)],
            *[pl.col(c).last() for c in untracked],
            pl.col("__gone").first(),
            pl.col(time).first().alias("valid_from"),
        )
        .with_columns(pl.col("valid_from").shift(-1).over(list(keys)).alias("valid_to"))
    )
    return intervals.filter(~pl.col("__gone")).select(*keys, *tracked, *untracked, "valid_from", "valid_to")
