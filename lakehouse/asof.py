"""The as-of join: each row gets the interval of its key that was in force at its time.

A pure function over any two frames. What finds the intervals is in lakehouse/asof_engines.py: one way for speed, in Polars, and
a plain range join in DuckDB that the first is checked by.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal

import polars as pl

from lakehouse.asof_engines import by_hash, by_range_join
from lakehouse.errors import Terminal, UsageError

Overlap = Literal["error", "latest"]
Engine = Literal["polars", "duckdb"]

PER_SECOND = {"ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
LARGEST = 2**63 - 1


def asof_join(
    rows: pl.DataFrame,
    intervals: pl.DataFrame,
    *,
    time: str,
    keys: Sequence[str],
    columns: Sequence[str],
    valid_from: str = "valid_from",
    valid_to: str = "valid_to",
    tolerance: timedelta | int | None = None,
    known_at: datetime | int | None = None,
    known_from: str = "known_from",
    known_to: str | None = "known_to",
    overlap: Overlap = "error",
    engine: Engine = "polars",
) -> pl.DataFrame:
    """Add `columns` of the interval with `valid_from <= time < valid_to` (NULL: open) and equal `keys`; NULL where none is.

    The order of `rows` is kept, and that of `intervals` does not matter. A NULL key, time or valid_from matches nothing. An
    interval that is empty, or ends before it begins, is in force at no time and does not count.

    Args:
        rows: `keys` and `time`; whatever else there is is passed on.
        intervals: `keys`, `columns`, valid_from, valid_to.
        time: like valid_from and valid_to a timestamp with a zone (any zone and unit: they are compared as instants); or all
            are dates, or all integers.
        keys: of one type on both sides, neither floats nor nested.
        tolerance: how long after its valid_from an interval still counts, that moment included; a plain number of the times'
            own unit if they are integers.
        known_at: only what was known then counts: intervals with `known_from <= known_at < known_to` (known_to NULL: still
            known; known_from NULL: never). known_to=None: what was known was never withdrawn.
        overlap: what becomes of intervals of one key that are in force at once (among those known at `known_at`).
            error: refused. latest: where several are in force, the one that began last counts; of those that began together
            the one that ends last (open: never), then the one whose `columns` are greatest, NULL being the least.
        engine: what finds the interval; the answers are the same.

    Raises:
        Terminal: intervals of one key overlap; the message names the key columns, not their values.
        UsageError: a column is missing, would be there twice, or is of a type that cannot be used, as a timestamp without zone.
    """
    _refuse_columns(rows, intervals, time, keys, columns, [valid_from, valid_to])
    known = intervals if known_at is None else _known_at(intervals, known_at, known_from, known_to)
    unit = _unit({f"rows.{time}": rows[time], **{f"intervals.{c}": known[c] for c in (valid_from, valid_to)}})
    places, values = [f"key{n}" for n in range(len(keys))], [f"value{n}" for n in range(len(columns))]
    left = pl.DataFrame(
        [*(_key(rows[k]).alias(p) for k, p in zip(keys, places, strict=True)), _ticks(rows[time], unit).alias("at")]
    )
    right = pl.DataFrame(
        [
            *(_key(known[k]).alias(p) for k, p in zip(keys, places, strict=True)),
            _ticks(known[valid_from], unit).alias("start"),
            _ticks(known[valid_to], unit).alias("end"),
            *(known[c].alias(v) for c, v in zip(columns, values, strict=True)),
        ]
    ).filter(pl.col("end").is_null() | (pl.col("start") < pl.col("end")))
    right = right.drop_nulls([*places, "start"])
    # a column in which nothing is known has no type: it takes that of the other side
    known_types = [pl.col(p).cast(left.schema[p] if right.schema[p] == pl.Null else right.schema[p]) for p in places]
    left, right = left.with_columns(known_types), right.with_columns(known_types)
    if overlap == "latest":  # of those that begin together the last counts
        right = right.sort("end", *values, nulls_last=[True, *(False for _ in values)])
    right = right.with_columns(_last(tolerance, unit).alias("last"))
    find = {"polars": by_hash, "duckdb": by_range_join}[engine]
    overlaps, found = find(left, right, places, values)
    if overlaps and overlap == "error":
        raise Terminal(
            f"as-of join: {overlaps} intervals overlap the one before them for the same {', '.join(keys)}; "
            "overlap='latest' takes the one that began last"
        )
    return rows.hstack(found.rename(dict(zip(values, columns, strict=True))))


def _refuse_columns(
    rows: pl.DataFrame, intervals: pl.DataFrame, time: str, keys: Sequence[str], columns: Sequence[str], bounds: Sequence[str]
) -> None:
    """Refuse columns that are absent, doubled or of types that cannot be compared."""
    if isinstance(keys, str) or isinstance(columns, str) or not keys:
        raise UsageError("as-of join: keys and columns are lists of columns, and there is at least one key")
    for what, frame, named in (("rows", rows, [*keys, time]), ("intervals", intervals, [*keys, *columns, *bounds])):
        _refuse_absent(what, frame, named)
    if doubled := sorted({c for c in columns if c in rows.columns or columns.count(c) > 1}):
        raise UsageError(f"as-of join: column {doubled[0]!r} would be there twice; rename one of them")
    for key in keys:
        mine, theirs = _key(rows[key].head(0)).dtype, _key(intervals[key].head(0)).dtype
        if mine != theirs and pl.Null not in (mine, theirs):
            raise UsageError(f"as-of join: key {key!r} is {mine} in the rows and {theirs} in the intervals; cast one of them")
        if theirs.is_float() or theirs.is_nested():
            raise UsageError(f"as-of join: key {key!r} is {theirs}, in which equality is not certain; round or flatten it")


def _key(values: pl.Series) -> pl.Series:
    """Categories as their text: two frames may number them differently."""
    return values.cast(pl.String) if isinstance(values.dtype, pl.Categorical | pl.Enum) else values


def _refuse_absent(what: str, frame: pl.DataFrame, named: Sequence[str]) -> None:
    if missing := [c for c in named if c not in frame.columns]:
        raise UsageError(f"as-of join: the {what} have no column {missing[0]!r}; there are {', '.join(frame.columns)}")


def _known_at(intervals: pl.DataFrame, at: datetime | int, known_from: str, known_to: str | None) -> pl.DataFrame:
    """The intervals that were known then, and not known to be wrong yet."""
    bounds = [known_from, *([known_to] if known_to else [])]
    _refuse_absent("intervals", intervals, bounds)
    moment = pl.Series("known_at", [at])
    unit = _unit({"known_at": moment, **{f"intervals.{c}": intervals[c] for c in bounds}})
    now = _ticks(moment, unit).item()
    begun = _ticks(intervals[known_from], unit) <= now
    return intervals.filter(begun & (_ticks(intervals[known_to], unit) > now).fill_null(value=True) if known_to else begun)


def _unit(times: dict[str, pl.Series]) -> str:
    """What the times are counted in to be compared: the finest unit of timestamps, `date` or `integer`."""
    kinds = {}
    for name, values in times.items():
        dtype = values.dtype
        if isinstance(dtype, pl.Datetime) and dtype.time_zone is None:
            raise UsageError(f"as-of join: {name} is a timestamp without a zone, so no instant; say which: dt.replace_time_zone")
        if isinstance(dtype, pl.Datetime):
            kinds[name] = "timestamp"
        elif dtype == pl.Date or dtype.is_integer():
            kinds[name] = "date" if dtype == pl.Date else "integer"
        elif dtype != pl.Null:
            raise UsageError(f"as-of join: {name} is {dtype}, neither a timestamp nor a date nor an integer")
    if len(set(kinds.values())) > 1:
        raise UsageError(
            f"as-of join: times of different kinds: {', '.join(f'{name} is a {kind}' for name, kind in kinds.items())}"
        )
    units = [v.dtype.time_unit for v in times.values() if isinstance(v.dtype, pl.Datetime)]
    return max(units, key=PER_SECOND.__getitem__) if units else next(iter(kinds.values()), "integer")


def _ticks(times: pl.Series, unit: str) -> pl.Series:
    """The times as numbers of that unit (a timestamp's: since 1970). One too far away for the finer unit becomes the farthest."""
    ticks = times.to_physical().cast(pl.Int64)
    if not isinstance(times.dtype, pl.Datetime) or times.dtype.time_unit == unit:
        return ticks
    factor = PER_SECOND[unit] // PER_SECOND[times.dtype.time_unit]
    return ticks.clip(-LARGEST // factor + 1, LARGEST // factor) * factor


def _last(tolerance: timedelta | int | None, unit: str) -> pl.Expr:
    """The last tick of `unit` in which an interval (start, end) counts."""
    last = (pl.col("end") - 1).fill_null(LARGEST)
    if tolerance is None:
        return last
    if isinstance(tolerance, timedelta) == (unit == "integer"):
        raise UsageError(f"as-of join: the times are counted in {unit}, the tolerance is a {type(tolerance).__name__}")
    if isinstance(tolerance, timedelta):
        microseconds = tolerance // timedelta(microseconds=1)
        tolerance = tolerance.days if unit == "date" else microseconds * PER_SECOND[unit] // PER_SECOND["us"]
    if tolerance < 0:
        raise UsageError("as-of join: the tolerance is negative")
    allowed = min(tolerance, LARGEST)
    return pl.min_horizontal(last, pl.col("start").clip(upper_bound=LARGEST - allowed) + allowed)
