"""What finds the interval of each row for the as-of join (lakehouse/asof.py): two ways that give the same answer.

Both take rows (the key columns `places`, at) and intervals (places, start, end, last, and the columns `values`): none empty, no
NULL but in end and values. An interval is in force in [start, end), NULL being never, and counts from start to last, both
included. Of those of one key that begin together the later row counts. Both return how many intervals begin before the one
before them of the same key has ended, and `values` for each row, in the order of the rows, of the interval that began last of
those that count then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from operator import and_

import duckdb
import polars as pl

from lakehouse.errors import Terminal

SLOTS_A_KEY = 8
"""At least so many values of a hash's leading bits for each key, so that most keys have theirs to themselves."""
LEAST_PART = 2**16
"""Rows: another thread for fewer costs more than it saves."""
SEEDS = 4
"""Of the hash, tried until no two keys share one. With 64 bits the first does."""


def by_range_join(
    rows: pl.DataFrame, intervals: pl.DataFrame, places: Sequence[str], values: Sequence[str]
) -> tuple[int, pl.DataFrame]:
    """In DuckDB: each row against all intervals of its key. It shows what is meant, and costs what that costs."""
    window = f"(PARTITION BY {', '.join(places)} ORDER BY start, rank)"
    overlapping = f"""
        SELECT count(*) FROM (
            SELECT lag(rank) OVER w IS NOT NULL AND coalesce(lag("end") OVER w > start, true) AS runs_on
            FROM intervals WINDOW w AS {window}
        ) WHERE runs_on
    """
    same = " AND ".join(f"r.{p} = i.{p}" for p in places)
    finding = f"""
        SELECT i.rank FROM rows AS r
        LEFT JOIN intervals AS i ON {same} AND r.at >= i.start AND r.at <= i.last
        QUALIFY row_number() OVER (PARTITION BY r.row ORDER BY i.start DESC, i.rank DESC) = 1
        ORDER BY r.row
    """
    with duckdb.connect() as connection:
        # copied, as DuckDB does not know how many rows Arrow has and would compare each with each
        for name, frame in (("rows", rows.with_row_index("row")), ("intervals", intervals.drop(values).with_row_index("rank"))):
            connection.register("given", frame.to_arrow())
            connection.execute(f"CREATE TABLE {name} AS FROM given")
        overlaps = int(connection.execute(overlapping).fetchall()[0][0])
        found = pl.DataFrame(connection.execute(finding).to_arrow_table())
    return overlaps, intervals.select(values)[found["rank"]]


def by_hash(
    rows: pl.DataFrame, intervals: pl.DataFrame, places: Sequence[str], values: Sequence[str]
) -> tuple[int, pl.DataFrame]:
    """In Polars, for speed: the key by its hash in a table, then a binary search among its intervals. Only these are sorted.

    A row costs the hash and the comparison of its key, and for each doubling of the most intervals that a key has one step of
    the search. Each step is one pass over whole columns.
    """
    if intervals.is_empty():
        return 0, intervals.select(values).clear(rows.height)
    index = _index(intervals, list(places))
    taken = [index.intervals[v] for v in values]

    def look_up(part: pl.DataFrame) -> pl.DataFrame:
        place = _found(part, index)
        return pl.DataFrame([column.gather(place) for column in taken])

    return index.overlaps, _in_parts(look_up, rows)


@dataclass(frozen=True)
class _Index:
    """Intervals sorted by the hash of their key and by start; their keys in the same order, and what leads to them.

    keys: each once. first: where the intervals of each key begin, and of a last one more where all end.
    starts: of the intervals, and as many more as a search may look beyond the end.
    slots: for each value of a hash's leading bits (hash // width) the first key with no lower ones. deepest: keys in one slot.
    most: intervals of one key. enclosing: see `_enclosing`; None if no intervals overlap.
    """

    intervals: pl.DataFrame
    keys: pl.DataFrame
    first: pl.Series
    starts: pl.Series
    slots: pl.Series
    width: int
    deepest: int
    most: int
    overlaps: int
    enclosing: pl.Series | None
    seed: int


def _index(intervals: pl.DataFrame, places: list[str]) -> _Index:
    by_hash, begins, seed = _sorted_by_hash(intervals, places)
    starts = begins.arg_true()
    first = pl.concat([starts, pl.Series([by_hash.height], dtype=starts.dtype)])
    most = int((first - first.shift()).max())  # type: ignore[arg-type]
    keys = by_hash.select("hash", *places)[starts]
    width = 2**64 // 2 ** max(1, (SLOTS_A_KEY * keys.height - 1).bit_length())
    slot = keys["hash"] // width
    runs_on = (pl.col("end").shift() > pl.col("start")) | pl.col("end").shift().is_null()
    overlapping = by_hash.select(runs_on & ~begins).to_series()
    return _Index(
        by_hash,
        keys.select(places),
        first,
        by_hash["start"].extend_constant(None, most),
        # the last slots may have no key after them: any key will do, as it is compared
        slot.search_sorted(pl.arange(0, 2**64 // width, dtype=pl.UInt64, eager=True), side="left")
        .clip(0, keys.height - 1)
        .cast(starts.dtype),
        width,
        int(slot.value_counts()["count"].max()),
        most,
        int(overlapping.sum()),
        _enclosing(by_hash["last"], begins) if overlapping.any() else None,
        seed,
    )


def _sorted_by_hash(intervals: pl.DataFrame, places: list[str]) -> tuple[pl.DataFrame, pl.Series, int]:
    """The intervals sorted by hash (a column more) and start, which of them are the first of their key, and the hash's seed."""
    for seed in range(SEEDS):
        # twice stable, by one column each: faster than by both at once, and of those that begin together the later stays it
        hashed = intervals.with_columns(_hash(intervals, places, seed))
        found = hashed.sort("start", maintain_order=True).sort("hash", maintain_order=True)
        another_hash = pl.col("hash") != pl.col("hash").shift()
        another_key = ~pl.all_horizontal(pl.col(p) == pl.col(p).shift() for p in places)
        begins, shared = found.select(
            another_hash.fill_null(value=True), shared=(another_key & ~another_hash).fill_null(value=False)
        )
        if not shared.any():
            return found, begins, seed
    raise Terminal(f"as-of join: different keys have the same hash, under each of {SEEDS} seeds")


def _hash(frame: pl.DataFrame, places: list[str], seed: int) -> pl.Series:
    found = frame[places[0]].hash(seed) if len(places) == 1 else frame.select(places).hash_rows(seed)
    return found.alias("hash")


def _enclosing(last: pl.Series, begins: pl.Series) -> pl.Series:
    """Of each interval the nearest before it, of the same key, that counts longer; NULL if none does.

    All look at the one before them at first, and where that ends no later go on to what it looks at itself. What is passed over
    ends no later than the one that passes it, so each round halves the way.
    """
    before = pl.arange(-1, len(last) - 1, eager=True)
    found = pl.select(pl.when(~begins).then(before).cast(pl.get_index_type())).to_series()
    while True:
        looking = found.is_not_null().arg_true()
        looking = looking.filter(last.gather(found.gather(looking)) <= last.gather(looking))
        if looking.is_empty():
            return found
        found = found.scatter(looking, found.gather(found.gather(looking)))


def _found(rows: pl.DataFrame, index: _Index) -> pl.Series:
    """The place in the index of the interval of each row; NULL where there is none."""
    key, known = _key_of(rows, index)
    at, first, ends = rows["at"], index.first.gather(key), index.first.gather(key + 1)
    begun, step = first, 2 ** (index.most.bit_length() - 1)
    while step:  # begun: after the last interval that is known to have begun
        further = begun + step
        has = (further <= ends) & (index.starts.gather(further - 1) <= at)
        begun = begun + has.fill_null(value=False).cast(begun.dtype) * step
        step //= 2
    place = pl.select(pl.when(known & (begun > first)).then(begun - 1)).to_series()
    last = index.intervals["last"]
    expired = (at > last.gather(place)).fill_null(value=False)
    if index.enclosing is None:
        return pl.select(pl.when(~expired).then(place)).to_series()
    while expired.any():  # what began last is over: perhaps one that encloses it is not
        asked = expired.arg_true()
        place = place.scatter(asked, index.enclosing.gather(place.gather(asked)))
        expired = (at > last.gather(place)).fill_null(value=False)
    return place


def _key_of(rows: pl.DataFrame, index: _Index) -> tuple[pl.Series, pl.Series]:
    """(the number of each row's key, whether it is that key: a row's may be none of the index, or NULL)."""
    places = index.keys.columns
    slot = _hash(rows, places, index.seed) // index.width
    key = index.slots.gather(slot)
    known = _same(rows, index.keys, key)
    for further in range(1, index.deepest):
        asked = (~known).arg_true()
        if asked.is_empty():
            break
        other = (key.gather(asked) + further).clip(upper_bound=index.keys.height - 1)
        matches = _same(rows.select(places)[asked], index.keys, other)
        asked, other = asked.filter(matches), other.filter(matches)
        key, known = key.scatter(asked, other), known.scatter(asked, values=True)
    return key, known


def _same(rows: pl.DataFrame, keys: pl.DataFrame, key: pl.Series) -> pl.Series:
    """Whether each row's key is the one of that number; NULL is no key."""
    return reduce(and_, (keys[p].gather(key) == rows[p] for p in keys.columns)).fill_null(value=False)


def _in_parts(do: Callable[[pl.DataFrame], pl.DataFrame], rows: pl.DataFrame) -> pl.DataFrame:
    """The same as `do(rows)`, in as many threads as Polars has: what is done to a column by itself is done by one."""
    threads = pl.thread_pool_size()
    size = max(LEAST_PART, -(-rows.height // threads))
    if rows.height <= size:
        return do(rows)
    with ThreadPoolExecutor(threads) as pool:
        return pl.concat(pool.map(do, (rows.slice(begin, size) for begin in range(0, rows.height, size))))
