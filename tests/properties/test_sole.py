"""Which value a key has while its intervals overlap, against asking at every moment."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from lakehouse.sole import sole

SCHEMA = {"user": pl.String, "place": pl.String, "room": pl.Int64, "valid_from": pl.Int64, "valid_to": pl.Int64}
found = st.lists(
    st.tuples(
        st.sampled_from(["u", "v"]),
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 1),
        st.integers(0, 8),
        st.one_of(st.none(), st.integers(0, 10)),
    ),
    max_size=12,
)


def frame(rows: list[tuple[Any, ...]]) -> pl.DataFrame:
    return pl.DataFrame(rows, SCHEMA, orient="row")


def one(rows: pl.DataFrame) -> pl.DataFrame:
    return sole(rows, keys=["user"], values=["place", "room"], count="places")


@given(found)
def test_at_every_moment_it_says_what_holds(rows: list[tuple[Any, ...]]) -> None:
    answer = one(frame(rows)).rows()
    for user in ("u", "v"):
        for at in range(12):
            there = {(p, r) for u, p, r, start, end in rows if u == user and start <= at and (end is None or at < end)}
            said = [(p, r, n) for u, p, r, n, start, end in answer if u == user and start <= at and (end is None or at < end)]
            assert said == ([] if not there else [(*next(iter(there)), 1)] if len(there) == 1 else [(None, None, len(there))])


@given(found, st.randoms(use_true_random=False))
def test_intervals_are_disjoint_sorted_and_whole_whatever_the_order(rows: list[tuple[Any, ...]], dice: Any) -> None:
    answer = one(frame(rows))
    mixed = rows + rows[: len(rows) // 2]
    dice.shuffle(mixed)
    assert one(frame(mixed)).equals(answer)
    assert answer.equals(answer.sort("user", "valid_from"))
    for before, after in pairwise(answer.rows()):
        if before[0] == after[0]:
            assert before[-1] is not None
            assert before[-1] <= after[-2]
            assert before[-1] < after[-2] or before[1:4] != after[1:4]


def test_two_places_for_a_while() -> None:
    rows = frame([("u", "a", 0, 0, None), ("u", "b", 0, 3, 5)])
    assert one(rows).rows() == [("u", "a", 0, 1, 0, 3), ("u", None, None, 2, 3, 5), ("u", "a", 0, 1, 5, None)]
