"""Comparing two sides and keeping what differs: against an oracle of plain dictionaries, and over a life of comparisons."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from lakehouse.drift import OBJECT, VALUES, compare, judged
from writers.canonical import agree
from writers.sweep import SCALE, sweep_offset, sweep_stands

Side = dict[str, dict[str, str]]
VALUE = st.sampled_from(["null", '"a"', '"b"', "1"])
SIDE = st.dictionaries(st.sampled_from(["o1", "o2", "o3"]), st.dictionaries(st.sampled_from(["f", "g"]), VALUE, min_size=1))
AT = datetime(2026, 1, 1, tzinfo=UTC)
TIME = pl.Datetime("us", "UTC")


def frame(side: Side) -> pl.DataFrame:
    rows = [("platform", "customer", o, f, v, True) for o, fields in side.items() for f, v in fields.items()]
    return pl.DataFrame(rows, schema=VALUES, orient="row")  # type: ignore[arg-type]


def expected(ours: Side, theirs: Side) -> set[tuple[Any, ...]]:
    found: set[tuple[Any, ...]] = {(o, "*", "missing", None, None) for o in theirs.keys() - ours.keys()}
    found |= {(o, "*", "extra", None, None) for o in ours.keys() - theirs.keys()}
    for o in ours.keys() & theirs.keys():
        for f, v in theirs[o].items():
            if f in ours[o]:
                found |= {(o, f, "differs", ours[o][f], v)} if ours[o][f] != v else set()
            elif v != "null":
                found.add((o, f, "missing", None, v))
    return found


@given(SIDE, SIDE)
def test_every_difference_and_no_other(ours: Side, theirs: Side) -> None:
    found = compare(frame(ours), frame(theirs)).select("object_id", "field", "state", "ours", "theirs")
    assert len(found) == len(set(found.iter_rows()))
    assert set(found.iter_rows()) == expected(ours, theirs)


@given(SIDE)
def test_a_side_agrees_with_itself(side: Side) -> None:
    assert compare(frame(side), frame(side)).is_empty()


def as_rows(found: pl.DataFrame, at: datetime) -> pl.DataFrame:
    moment, nothing = pl.lit(at).cast(TIME), pl.lit(None).cast(TIME)
    times = {"found_at": moment, "seen_at": moment} | dict.fromkeys(("theirs_at", "repaired_at", "resolved_at"), nothing)
    return found.with_columns(source=pl.lit("s"), run_id=pl.lit("r"), **times)


@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=6))
def test_what_is_open_is_what_differs_now(comparisons: list[tuple[Side, Side]]) -> None:
    """Of all objects that were ever compared, each compared every time."""
    everything = pl.DataFrame(
        {"account": ["platform"] * 3, "livemode": [True] * 3, "object_type": ["customer"] * 3, "object_id": ["o1", "o2", "o3"]}
    )
    table = as_rows(compare(frame({}), frame({})), AT)
    for number, (ours, theirs) in enumerate(comparisons):
        at = AT + timedelta(hours=number)
        is_open = pl.col("resolved_at").is_null()
        found = as_rows(compare(frame(ours), frame(theirs)), at)
        after, fresh = judged(table.filter(is_open), found, everything, at)
        table = pl.concat([table.filter(~is_open), after, fresh])
        now = set(table.filter(is_open).select("object_id", "field").iter_rows())
        assert now == {row[:2] for row in expected(ours, theirs)}
        key = [*OBJECT, "field", "found_at"]
        assert table.select(key).is_duplicated().sum() == 0
        closed = table.filter(~is_open)
        assert (closed["resolved_at"] > closed["found_at"]).all()


@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=4))
def test_what_was_not_compared_stays_as_it_was(comparisons: list[tuple[Side, Side]]) -> None:
    nothing = pl.DataFrame(
        schema={"account": pl.String, "livemode": pl.Boolean, "object_type": pl.String, "object_id": pl.String}
    )
    table = as_rows(compare(frame({}), frame({})), AT)
    for ours, theirs in comparisons:
        found = as_rows(compare(frame(ours), frame(theirs)), AT)
        after, fresh = judged(table, found, nothing, AT)
        assert after["resolved_at"].null_count() == after.height == table.height
        table = pl.concat([after, fresh])


@given(st.integers(1, 1000), st.integers(0, SCALE - 1))
def test_where_a_sweep_stands_is_one_number_that_grows(sweep: int, created: int) -> None:
    assert sweep_stands(sweep_offset(sweep, created)) == (sweep, created)
    assert created == 0 or sweep_offset(sweep, created) < sweep_offset(sweep, created - 1)
    assert sweep_offset(sweep, 0) < sweep_offset(sweep + 1, SCALE - 1)
    assert sweep_stands(0) == (0, 0)


def test_lists_agree_where_both_say_something() -> None:
    assert agree([{"id": 1, "a": 2}], [{"id": 1, "b": 3}])
    assert not agree([{"id": 1, "a": 2}], [{"id": 1, "a": 3}])
    assert agree([{"id": 1, "a": 2}], [{"id": 1, "a": 3}], {"a"})
    assert not agree([{"id": 1}], [])
    assert not agree({"a": [1, 2]}, {"a": [2, 1]})
