"""What held at a time: the last row of a group that began by then, a column at a time."""

from __future__ import annotations

import polars as pl


def begun(table: pl.DataFrame, group: str, time: str, groups: pl.Series, times: pl.Series) -> pl.Series:
    """Of each (group, epoch ms) how many rows of the table, which is sorted by both, come at or before it."""
    return _key(table[group], table[time]).search_sorted(_key(groups, times), side="right").cast(pl.Int64)


def row_of(table: pl.DataFrame, group: str, groups: pl.Series, place: pl.Series) -> tuple[pl.DataFrame, pl.Series]:
    """The rows at these places, and whether each is one of its group: where not, the row says nothing."""
    rows = table[place.clip(0, table.height - 1)]
    return rows, (place >= 0) & (place < table.height) & (rows[group] == groups)


def _key(group: pl.Series, ms: pl.Series) -> pl.Series:
    """One sortable number of a group and a time (epoch ms stay below 2**42 until the year 2109)."""
    return group.cast(pl.Int64) * (1 << 42) + ms
