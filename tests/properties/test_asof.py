"""The as-of join, against looking at every interval."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lakehouse.asof import asof_join
from lakehouse.errors import Terminal

ROWS = {"n": pl.Int64, "account": pl.String, "id": pl.Int64, "at": pl.Int64}
INTERVALS = {
    "account": pl.String,
    "id": pl.Int64,
    "valid_from": pl.Int64,
    "valid_to": pl.Int64,
    "plan": pl.String,
    "seats": pl.Int64,
}

account = st.sampled_from(["a", "b", None])
id_ = st.sampled_from([0, 1, None])
rows = st.lists(st.tuples(account, id_, st.one_of(st.none(), st.integers(0, 12))), max_size=12).map(
    lambda found: pl.DataFrame([(n, *r) for n, r in enumerate(found)], ROWS, orient="row")
)


@st.composite
def timelines(draw: st.DrawFn) -> pl.DataFrame:
    """Intervals of several keys, NULL ones among them: disjoint, with and without gaps, the last one open or not; shuffled."""
    found = []
    for a in ("a", "b", None):
        for i in (0, 1, None):
            bounds = sorted(draw(st.sets(st.integers(0, 12), max_size=6)))
            for n, (start, end) in enumerate(zip(bounds, [*bounds[1:], None], strict=False)):
                if draw(st.integers(0, 3)):  # else a gap
                    plan = draw(st.sampled_from(["starter", "pro", None]))
                    found.append((a, i, start, end, plan, n))
    return pl.DataFrame(draw(st.permutations(found)), INTERVALS, orient="row")


def join(left: pl.DataFrame, right: pl.DataFrame) -> pl.DataFrame:
    return asof_join(left, right, time="at", keys=["account", "id"], columns=["plan", "seats"])


def by_hand(left: pl.DataFrame, right: pl.DataFrame) -> list[tuple[Any, ...]]:
    found = []
    for n, a, i, at in left.rows():
        holds = [
            (plan, seats)
            for ra, ri, start, end, plan, seats in right.rows()
            if None not in (a, i, at, start) and (a, i) == (ra, ri) and start <= at and (end is None or at < end)
        ]
        assert len(holds) < 2
        found.append((n, a, i, at, *(holds[0] if holds else (None, None))))
    return found


@given(rows, timelines())
def test_each_row_gets_the_interval_in_force_and_stays_in_its_place(left: pl.DataFrame, right: pl.DataFrame) -> None:
    found = join(left, right)
    assert found.columns == [*ROWS, "plan", "seats"]
    assert found.rows() == by_hand(left, right)


@given(rows, timelines(), st.randoms(use_true_random=False))
def test_the_order_of_the_intervals_does_not_matter(left: pl.DataFrame, right: pl.DataFrame, dice: Any) -> None:
    assert join(left, right[dice.sample(range(right.height), right.height)]).equals(join(left, right))


@given(rows, timelines(), st.data())
def test_an_interval_that_overlaps_another_is_refused(left: pl.DataFrame, right: pl.DataFrame, data: st.DataObject) -> None:
    """Of an interval, one more is made: the same, one inside, one that reaches over its end, an empty one at its start."""
    known = right.drop_nulls(["account", "id"]).rows()
    if not known:
        return
    a, i, start, end, *_ = data.draw(st.sampled_from(known))
    second = data.draw(
        st.sampled_from(
            [(start, end), (start, None), (start, start), (start + 1, start + 2) if end != start + 1 else (start, end)]
        )
    )
    one_more = pl.DataFrame([(a, i, *second, "pro", 9)], INTERVALS, orient="row")
    for twice in ([right, one_more], [one_more, right]):
        with pytest.raises(Terminal, match=r"overlap the one before them for the same account, id"):
            join(left, pl.concat(twice))


def test_bounds_are_half_open() -> None:
    right = pl.DataFrame([("a", 0, 3, 5, "pro", 1), ("a", 0, 5, None, "max", 2)], INTERVALS, orient="row")
    left = pl.DataFrame([(n, "a", 0, at) for n, at in enumerate([5, 4, 3, 2, 99])], ROWS, orient="row")
    assert join(left, right)["plan"].to_list() == ["max", "pro", "pro", None, "max"]


def test_nothing_of_nothing() -> None:
    left, right = pl.DataFrame(schema=ROWS), pl.DataFrame(schema=INTERVALS)
    assert join(left, right).is_empty()
    one = pl.DataFrame([(0, "a", 0, 1)], ROWS, orient="row")
    assert join(one, right).rows() == [(0, "a", 0, 1, None, None)]
