"""Which value a key has at each time when its intervals may overlap: the one, or that there are several."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

FROM, TO = "valid_from", "valid_to"


def sole(intervals: pl.DataFrame, *, keys: Sequence[str], values: Sequence[str], count: str) -> pl.DataFrame:
    """Disjoint intervals of each key, with its values while these are one, and how many there are at once.

    A sweep over the ends of the intervals, in columns: while a key has one value, the running sum of the values' numbers is
    the number of that one.

    Args:
        intervals: columns `keys`, `values`, valid_from, valid_to (NULL: open), half-open; they may overlap, repeat and touch.
            An empty one (or one that ends before it begins) holds at no time.
        keys, values: not NULL; the values of a row belong together.
        count: name of the column for how many different values hold at once.

    Returns:
        Columns keys, values (NULL while there are several), `count` (Int64, 1 or more), valid_from, valid_to; sorted by keys and
        valid_from, neighbours that say the same as one. Where nothing holds there is a gap.
    """
    keys, values = list(keys), list(values)
    real = intervals.filter(pl.col(TO).is_null() | (pl.col(FROM) < pl.col(TO)))
    numbers = real.select(values).unique().sort(values).with_row_index("__n").with_columns(pl.col("__n").cast(pl.Int64) + 1)
    real = real.join(numbers, on=values)
    ends = pl.concat(
        [
            real.select(*keys, "__n", pl.col(FROM).alias("__at"), pl.lit(1, pl.Int32).alias("__step")),
            real.filter(pl.col(TO).is_not_null()).select(
                *keys, "__n", pl.col(TO).alias("__at"), pl.lit(-1, pl.Int32).alias("__step")
            ),
        ]
    )
    # a value that several intervals say at once holds once
    held = (pl.col("__step").cum_sum() > 0).over([*keys, "__n"], order_by="__at").cast(pl.Int64)
    flips = (
        ends.group_by(*keys, "__n", "__at")
        .agg(pl.col("__step").sum())
        .with_columns(held.alias("__held"))
        .with_columns(
            (pl.col("__held") - pl.col("__held").shift(1, fill_value=0).over([*keys, "__n"], order_by="__at")).alias("__flip")
        )
    )
    swept = (
        flips.group_by(*keys, "__at")
        .agg(pl.col("__flip").sum().alias("__count"), (pl.col("__flip") * pl.col("__n")).sum())
        .sort(*keys, "__at")
        .with_columns(pl.col("__count", "__flip").cum_sum().over(keys))
        .with_columns(pl.when(pl.col("__count") == 1).then("__flip").alias("__n"))
    )
    same = pl.all_horizontal([pl.col(c).eq_missing(pl.col(c).shift()) for c in (*keys, "__count", "__n")])
    return (
        swept.filter(~same)
        .with_columns(pl.col("__at").shift(-1).over(keys).alias(TO))
        .filter(pl.col("__count") > 0)
        .join(numbers, on="__n", how="left", maintain_order="left")
        .select(*keys, *values, pl.col("__count").cast(pl.Int64).alias(count), pl.col("__at").alias(FROM), TO)
    )
