"""The as-of join: each row gets the interval of its key that was in force at its time."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from lakehouse.errors import Terminal


def asof_join(
    rows: pl.DataFrame,
    intervals: pl.DataFrame,
    *,
    time: str,
    keys: Sequence[str],
    columns: Sequence[str],
    valid_from: str = "valid_from",
    valid_to: str = "valid_to",
) -> pl.DataFrame:
    """Add `columns` of the interval with `valid_from <= time < valid_to` (NULL: open) and equal `keys`; NULL where none is.

    Deterministic: intervals that overlap, or two of one key that begin at the same time, are refused and not chosen among.
    A NULL key or time matches nothing. The order of `rows` is kept.

    Raises:
        Terminal: two intervals of one key overlap; the message names the key columns, not their values.
    """
    start, end = "__start", "__end"
    taken = {c: f"__{i}" for i, c in enumerate(columns)}
    right = (
        intervals.select(
            *keys, pl.col(valid_from).alias(start), pl.col(valid_to).alias(end), *(pl.col(c).alias(n) for c, n in taken.items())
        )
        .drop_nulls([*keys, start])
        .sort([*keys, start])
    )
    same_key = pl.all_horizontal([pl.col(k) == pl.col(k).shift() for k in keys])
    # also refused: an empty interval that begins with another one, because the sort would choose between them
    runs_on = pl.col(end).shift().is_null() | (pl.col(end).shift() > pl.col(start)) | (pl.col(start).shift() == pl.col(start))
    if overlapping := right.select((same_key & runs_on).sum()).item():
        raise Terminal(f"as-of join: {overlapping} intervals overlap the one before them for the same {', '.join(keys)}")
    joined = (
        rows.with_row_index("__row")
        .sort(time)
        .join_asof(
            right.sort(start),
            left_on=time,
            right_on=start,
            by=list(keys),
            strategy="backward",
            coalesce=False,
            check_sortedness=False,
        )
        .sort("__row")
    )
    inside = pl.col(start).is_not_null() & (pl.col(end).is_null() | (pl.col(time) < pl.col(end)))
    return joined.select(*rows.columns, *(pl.when(inside).then(pl.col(n)).alias(c) for c, n in taken.items()))
