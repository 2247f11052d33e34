"""The as-of join on both engines, against looking at every interval."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakehouse import asof_engines
from lakehouse.asof import Engine, asof_join
from lakehouse.errors import Terminal, UsageError

ENGINES: tuple[Engine, ...] = ("polars", "duckdb")
ROWS = {"n": pl.Int64, "account": pl.String, "id": pl.Int64, "at": pl.Int64}
INTERVALS = {
    "account": pl.String,
    "id": pl.Int64,
    "valid_from": pl.Int64,
    "valid_to": pl.Int64,
    "known_from": pl.Int64,
    "known_to": pl.Int64,
    "plan": pl.String,
    "seats": pl.Int64,
}

account = st.sampled_from(["a", "b", None])
id_ = st.sampled_from([0, 1, None])
moment = st.one_of(st.none(), st.integers(0, 12))
rows = st.lists(st.tuples(account, id_, moment), max_size=12).map(
    lambda found: pl.DataFrame([(n, *r) for n, r in enumerate(found)], ROWS, orient="row")
)
plans = st.sampled_from(["starter", "pro", None])
any_intervals = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from([0, 1]), moment, moment, moment, moment, plans, st.integers(0, 2)),
    max_size=9,
).map(lambda found: pl.DataFrame(found, INTERVALS, orient="row"))
"""With overlaps, gaps, repetitions; empty ones and such that end before they begin."""


@st.composite
def timelines(draw: st.DrawFn) -> pl.DataFrame:
    """Intervals of several keys, NULL ones among them: disjoint, with and without gaps, the last one open or not."""
    found = []
    for a in ("a", "b", None):
        for i in (0, 1, None):
            bounds = sorted(draw(st.sets(st.integers(0, 12), max_size=6)))
            for n, (start, end) in enumerate(zip(bounds, [*bounds[1:], None], strict=False)):
                if draw(st.integers(0, 3)):  # else a gap
                    found.append((a, i, start, end, None, None, draw(plans), n))
    return pl.DataFrame(found, INTERVALS, orient="row")


def join(left: pl.DataFrame, right: pl.DataFrame, engine: Engine = "polars", **more: Any) -> pl.DataFrame:
    return asof_join(left, right, time="at", keys=["account", "id"], columns=["plan", "seats"], engine=engine, **more)


def by_hand(
    left: pl.DataFrame, right: pl.DataFrame, tolerance: int | None = None, known_at: int | None = None
) -> list[tuple[Any, ...]]:
    """Of all that count the last by (valid_from, valid_to, plan, seats): open last, NULL first."""
    found = []
    for n, a, i, at in left.rows():
        holds = [
            (start, end is None, end, plan is not None, plan, seats)
            for ra, ri, start, end, since, until, plan, seats in right.rows()
            if None not in (a, i, at, start) and (a, i) == (ra, ri) and start <= at and (end is None or at < end)
            if tolerance is None or at - start <= tolerance
            if known_at is None or (since is not None and since <= known_at and (until is None or known_at < until))
        ]
        best = max(holds, key=lambda h: (h[0], h[1], h[2] or 0, h[3], h[4] or "", h[5]), default=None)
        found.append((n, a, i, at, *((best[4], best[5]) if best else (None, None))))
    return found


def overlapping(right: pl.DataFrame, known_at: int | None) -> bool:
    """Whether at some moment two intervals of a key are in force."""
    known = [
        r
        for r in right.rows()
        if known_at is None or (r[4] is not None and r[4] <= known_at and (r[5] is None or known_at < r[5]))
    ]
    return any(
        sum((a, i) == (r[0], r[1]) and r[2] is not None and r[2] <= at and (r[3] is None or at < r[3]) for r in known) > 1
        for a in "ab"
        for i in (0, 1)
        for at in range(13)
    )


@given(rows, timelines())
def test_each_row_gets_the_interval_in_force_and_stays_in_its_place(left: pl.DataFrame, right: pl.DataFrame) -> None:
    found = join(left, right)
    assert found.columns == [*ROWS, "plan", "seats"]
    assert found.rows() == by_hand(left, right)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=25)
@given(rows, any_intervals, st.one_of(st.none(), st.integers(0, 12)), st.one_of(st.none(), st.integers(0, 12)))
def test_whatever_the_intervals_both_engines_find_what_a_search_finds(
    engine: Engine, left: pl.DataFrame, right: pl.DataFrame, tolerance: int | None, known_at: int | None
) -> None:
    options = {"tolerance": tolerance, "known_at": known_at}
    found = join(left, right, engine, overlap="latest", **options)
    assert found.rows() == by_hand(left, right, tolerance, known_at)
    assert found.schema == ROWS | {"plan": pl.String, "seats": pl.Int64}
    if overlapping(right, known_at):
        with pytest.raises(Terminal, match=r"overlap the one before them for the same account, id; overlap='latest'"):
            join(left, right, engine, **options)
    else:
        assert join(left, right, engine, **options).equals(found)


@given(rows, any_intervals, st.randoms(use_true_random=False))
def test_the_order_of_the_intervals_does_not_matter(left: pl.DataFrame, right: pl.DataFrame, dice: Any) -> None:
    shuffled = right[dice.sample(range(right.height), right.height)]
    assert join(left, shuffled, overlap="latest").equals(join(left, right, overlap="latest"))


@settings(max_examples=30)
@given(rows, any_intervals, st.integers(1, 3))
def test_keys_that_share_slots_or_hashes_are_told_apart(left: pl.DataFrame, right: pl.DataFrame, values: int) -> None:
    """A hash of so few values that keys share it, until another seed tells them apart."""
    true = asof_engines._hash

    def poor(frame: pl.DataFrame, places: list[str], seed: int) -> pl.Series:
        found = true(frame, places, seed)
        return found % values if seed == 0 else found // 2**62 * 2**62 + found % 2**20  # type: ignore[operator]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asof_engines, "_hash", poor)
        assert join(left, right, overlap="latest").rows() == by_hand(left, right)


def test_many_rows_in_several_threads_are_as_few() -> None:
    n = 2 * asof_engines.LEAST_PART + 3
    i = pl.arange(0, n, eager=True)
    left = pl.DataFrame({"account": "a" + (i % 1000).cast(pl.String), "at": i % 97}).with_columns(id=pl.lit(0, pl.Int64))
    right = pl.DataFrame(
        [
            ("a" + str(k), 0, v, v + 10 if v % 20 else None, None, None, f"{k}-{v}", v)
            for k in range(0, 1100, 2)
            for v in (3, 13, 60)
        ],
        INTERVALS,
        orient="row",
    )
    found = join(left, right)
    assert found.equals(join(left, right, "duckdb"))
    assert found.equals(pl.concat([join(part, right) for part in left.iter_slices(50_000)]))
    assert found.filter(account="a8", at=60)["plan"].unique().to_list() == ["8-60"]


def test_bounds_are_half_open_and_a_tolerance_includes_its_end() -> None:
    right = pl.DataFrame([("a", 0, 3, 5, 0, None, "pro", 1), ("a", 0, 5, None, 0, None, "max", 2)], INTERVALS, orient="row")
    left = pl.DataFrame([(n, "a", 0, at) for n, at in enumerate([5, 4, 3, 2, 99])], ROWS, orient="row")
    for engine in ENGINES:
        assert join(left, right, engine)["plan"].to_list() == ["max", "pro", "pro", None, "max"]
        assert join(left, right, engine, tolerance=94)["plan"].to_list() == ["max", "pro", "pro", None, "max"]
        assert join(left, right, engine, tolerance=93)["plan"].to_list() == ["max", "pro", "pro", None, None]


def test_as_it_was_known_then() -> None:
    """A correction was learnt at 20: until then the interval that it replaced counts, and no overlap is seen."""
    right = pl.DataFrame(
        [("a", 0, 0, None, 10, 20, "starter", 1), ("a", 0, 0, 5, 20, None, "starter", 2), ("a", 0, 5, None, 20, None, "pro", 3)],
        INTERVALS,
        orient="row",
    )
    left = pl.DataFrame([(0, "a", 0, 4), (1, "a", 0, 5)], ROWS, orient="row")
    for engine in ENGINES:
        for known_at, plans_then in ((9, [None, None]), (10, ["starter"] * 2), (19, ["starter"] * 2), (20, ["starter", "pro"])):
            assert join(left, right, engine, known_at=known_at)["plan"].to_list() == plans_then
        with pytest.raises(Terminal, match="1 intervals overlap"):
            join(left, right, engine)
        assert join(left, right, engine, known_at=19, known_to=None)["plan"].to_list() == ["starter", "starter"]


def instants(values: list[datetime | None], unit: Any, zone: str) -> pl.Series:
    return pl.Series(values, dtype=pl.Datetime("us", "UTC")).dt.convert_time_zone(zone).dt.cast_time_unit(unit)


UNITS = ("ms", "us", "ns")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("left_unit", UNITS)
@pytest.mark.parametrize("right_unit", UNITS)
def test_units_and_zones_do_not_matter(engine: Engine, left_unit: str, right_unit: str) -> None:
    noon = datetime(2026, 3, 29, 12, tzinfo=UTC)
    hour = timedelta(hours=1)
    left = pl.DataFrame({"k": ["a"] * 4, "at": instants([noon - hour, noon, noon + hour, None], left_unit, "Asia/Tokyo")})
    right = pl.DataFrame(
        {
            "k": ["a", "a"],
            "valid_from": instants([noon, noon + hour], right_unit, "America/New_York"),
            "valid_to": instants([noon + hour, datetime(9999, 1, 1, tzinfo=UTC)], "ms", "UTC"),
            "known_from": instants([noon, noon], right_unit, "UTC"),
            "plan": ["starter", "pro"],
        }
    )

    def found(**more: Any) -> list[str | None]:
        return asof_join(left, right, time="at", keys=["k"], columns=["plan"], engine=engine, **more)["plan"].to_list()

    assert found() == [None, "starter", "pro", None]
    assert found(tolerance=timedelta.max) == [None, "starter", "pro", None]
    in_berlin = noon.astimezone(ZoneInfo("Europe/Berlin"))
    assert found(known_at=in_berlin, known_to=None) == [None, "starter", "pro", None]
    assert found(known_at=in_berlin - timedelta(microseconds=1), known_to=None) == [None] * 4
    later = left.with_columns(pl.col("at") + timedelta(milliseconds=5))
    for tolerance, plan in ((timedelta(milliseconds=5), "pro"), (timedelta(milliseconds=4, microseconds=999), None)):
        last = asof_join(later, right, time="at", keys=["k"], columns=["plan"], engine=engine, tolerance=tolerance)
        assert last["plan"][2] == plan


def test_what_cannot_be_compared_is_refused() -> None:
    day = datetime(2026, 1, 1, tzinfo=UTC)
    left = pl.DataFrame({"k": ["a"], "at": [day]})
    right = pl.DataFrame({"k": ["a"], "valid_from": [day], "valid_to": pl.Series([None], dtype=pl.Null), "plan": ["pro"]})

    def joined(rows: pl.DataFrame = left, intervals: pl.DataFrame = right, **more: Any) -> pl.DataFrame:
        return asof_join(rows, intervals, **({"time": "at", "keys": ["k"], "columns": ["plan"]} | more))

    naive = pl.col("at").dt.replace_time_zone(None)
    began = pl.col("valid_from")
    for text, refused in {
        r"rows\.at is a timestamp without a zone": {"rows": left.with_columns(naive)},
        r"intervals\.valid_from is a timestamp without": {"intervals": right.with_columns(began.dt.replace_time_zone(None))},
        "times of different kinds: rows.at is a timestamp, intervals.valid_from is a date": {
            "intervals": right.with_columns(began.dt.date())
        },
        "rows.at is String": {"rows": left.with_columns(pl.col("at").cast(pl.String))},
        "known_at is a timestamp without a zone": {
            "known_at": datetime(2026, 1, 1),  # noqa: DTZ001
            "intervals": right.with_columns(known_from=began, known_to=began),
        },
        "the intervals have no column 'known_from'": {"known_at": day},
        "key 'k' is Int32 in the rows and String in the intervals": {"rows": left.with_columns(k=1)},
        "key 'x' is Float64, in which": {"rows": left.with_columns(x=0.5), "intervals": right.with_columns(x=0.5), "keys": ["x"]},
        "would be there twice": {"rows": left.with_columns(plan=1)},
        "the tolerance is negative": {"tolerance": timedelta(seconds=-1)},
        "the times are counted in us, the tolerance is a int": {"tolerance": 3},
        "lists of columns": {"keys": "k"},
        "there is at least one key": {"keys": []},
        "the rows have no column 'then'": {"time": "then"},
    }.items():
        with pytest.raises(UsageError, match=text):
            joined(**refused)


@pytest.mark.parametrize("engine", ENGINES)
def test_odd_frames(engine: Engine) -> None:
    left, right = pl.DataFrame(schema=ROWS), pl.DataFrame(schema=INTERVALS)
    assert join(left, right, engine).is_empty()
    one = pl.DataFrame([(0, "a", 0, 1)], ROWS, orient="row")
    assert join(one, right, engine).rows() == [(0, "a", 0, 1, None, None)]
    always = pl.DataFrame([("a", 0, 0, None, None, None, "pro", 1)], INTERVALS, orient="row")
    assert join(one.with_columns(account=None), always, engine)["plan"].to_list() == [None]
    assert join(one, always.with_columns(account=None), engine)["plan"].to_list() == [None]
    named = one.with_columns(pl.col("account").cast(pl.Categorical))
    assert join(named, always, engine)["plan"].to_list() == ["pro"]
    nested = always.with_columns(plan=pl.struct("plan", "seats"))
    assert join(one, nested, engine)["plan"].to_list() == [{"plan": "pro", "seats": 1}]
    two = pl.concat([nested, nested])
    assert join(one, two, engine, overlap="latest")["plan"].to_list() == [{"plan": "pro", "seats": 1}]
    days = pl.DataFrame({"k": ["a"], "at": [date(2026, 1, 3)]})
    spans = pl.DataFrame({"k": ["a"], "valid_from": [date(2026, 1, 1)], "valid_to": [date(2026, 1, 4)], "v": [1]})
    for tolerance, value in ((None, 1), (timedelta(days=2), 1), (timedelta(days=1), None)):
        found = asof_join(days, spans, time="at", keys=["k"], columns=["v"], engine=engine, tolerance=tolerance)
        assert found["v"].to_list() == [value]
