"""SCD2 as a function of the set of versions: against a brute-force evaluation of every point in time."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lakehouse.errors import Terminal
from lakehouse.scd2 import scd2

SCHEMA = {
    "account": pl.String,
    "id": pl.Int64,
    "at": pl.Int64,
    "seq": pl.Int32,
    "status": pl.String,
    "seats": pl.Int64,
    "note": pl.String,
    "gone": pl.Boolean,
}
HORIZON = 12

Row = tuple[Any, ...]
row = st.tuples(
    st.sampled_from(["a", "b"]),
    st.integers(0, 1),
    st.integers(0, HORIZON - 2),
    st.integers(0, 2),
    st.sampled_from(["active", "past_due", None]),
    st.sampled_from([1, 2, None]),
    st.sampled_from(["x", "y", None]),
    st.sampled_from([False, False, False, True, None]),
)


# the same (key, time, sequence) may come twice as an upsert and a delete, but not with two contents
def identity(r: Row) -> tuple[Any, ...]:
    return (*r[:4], bool(r[7]))


versions = st.lists(row, max_size=14, unique_by=identity)


def frame(rows: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(rows, SCHEMA, orient="row")


def history(rows: list[Row]) -> pl.DataFrame:
    return scd2(
        frame(rows),
        keys=["account", "id"],
        time="at",
        sequence=["seq"],
        tracked=["status", "seats"],
        untracked=["note"],
        deleted="gone",
    )


def state_at(rows: list[Row], account: str, id_: int, moment: int) -> tuple[Any, Any] | None:
    """The tracked values in force, by looking at every version there is."""
    known = [r for r in rows if r[:2] == (account, id_) and r[2] <= moment]
    if not known:
        return None
    last = max(known, key=lambda r: (r[2], r[3], bool(r[7])))
    return None if last[7] else (last[4], last[5])


@given(versions)
def test_it_says_what_was_in_force_at_every_moment(rows: list[Row]) -> None:
    found = history(rows).rows(named=True)
    for account in "ab":
        for id_ in (0, 1):
            for moment in range(HORIZON):
                holds = [
                    (r["status"], r["seats"])
                    for r in found
                    if (r["account"], r["id"]) == (account, id_)
                    and r["valid_from"] <= moment
                    and (r["valid_to"] is None or moment < r["valid_to"])
                ]
                state = state_at(rows, account, id_, moment)
                assert holds == ([] if state is None else [state])


@given(versions, st.randoms(use_true_random=False))
def test_order_and_repetition_of_rows_do_not_matter(rows: list[Row], dice: Any) -> None:
    shuffled = rows + dice.choices(rows, k=3) if rows else []
    dice.shuffle(shuffled)
    assert history(shuffled).equals(history(rows))


@given(st.lists(row, min_size=1, max_size=8), st.data())
def test_order_does_not_matter_even_if_one_sequence_has_two_contents(rows: list[Row], data: st.DataObject) -> None:
    others = data.draw(st.lists(row, min_size=len(rows), max_size=len(rows)))
    both = [*rows, *((*r[:4], *other[4:]) for r, other in zip(rows, others, strict=True))]
    assert history(both[::-1]).equals(history(both))


@given(versions)
def test_intervals_are_sorted_not_empty_disjoint_and_as_few_as_possible(rows: list[Row]) -> None:
    found = history(rows)
    assert found.columns == ["account", "id", "status", "seats", "note", "valid_from", "valid_to"]
    assert found.equals(found.sort("account", "id", "valid_from"))
    for r in found.rows(named=True):
        assert r["valid_to"] is None or r["valid_to"] > r["valid_from"]
    for of_key in found.partition_by("account", "id"):
        for before, after in zip(of_key.rows(named=True), of_key.rows(named=True)[1:], strict=False):
            assert before["valid_to"] is not None
            assert before["valid_to"] <= after["valid_from"]
            if before["valid_to"] == after["valid_from"]:
                assert (before["status"], before["seats"]) != (after["status"], after["seats"])
            else:  # a gap: a delete stands at its start
                key = (before["account"], before["id"])
                assert state_at(rows, *key, before["valid_to"]) is None


@given(versions)
def test_untracked_columns_have_the_last_value_of_their_interval(rows: list[Row]) -> None:
    for r in history(rows).rows(named=True):
        of_key = [v for v in rows if v[:2] == (r["account"], r["id"]) and not v[7]]
        within = [v for v in of_key if r["valid_from"] <= v[2] and (r["valid_to"] is None or v[2] < r["valid_to"])]
        assert r["note"] == max(within, key=lambda v: (v[2], v[3]))[6]


@given(versions, st.sampled_from(["account", "id", "at", "seq"]))
def test_a_null_key_time_or_sequence_is_refused(rows: list[Row], column: str) -> None:
    place = list(SCHEMA).index(column)
    holed = frame([*rows, tuple(None if i == place else v for i, v in enumerate(("a", 0, 1, 0, "active", 1, "x", False)))])
    with pytest.raises(Terminal, match=f"1 rows have no '{column}'"):
        scd2(holed, keys=["account", "id"], time="at", sequence=["seq"], tracked=["status"], deleted="gone")


# --- by example --------------------------------------------------------------------------------------------------------


def intervals(*events: tuple[int, str | None], delete_at: tuple[int, ...] = ()) -> list[tuple[Any, ...]]:
    rows = [("a", 0, at, 0, status, 1, None, False) for at, status in events]
    rows += [("a", 0, at, 0, None, None, None, True) for at in delete_at]
    return history(rows).select("status", "valid_from", "valid_to").rows()


def test_equal_neighbours_coalesce_and_a_later_split_restarts_at_the_one_left_out() -> None:
    assert intervals((1, "active"), (5, "active")) == [("active", 1, None)]
    assert intervals((1, "active"), (5, "active"), (3, "past_due")) == [
        ("active", 1, 3),
        ("past_due", 3, 5),
        ("active", 5, None),
    ]


def test_a_late_row_splits_the_interval_it_falls_in() -> None:
    assert intervals((1, "active"), (9, "canceled"), (4, "past_due")) == [
        ("active", 1, 4),
        ("past_due", 4, 9),
        ("canceled", 9, None),
    ]


def test_a_delete_closes_and_a_return_opens_after_a_gap() -> None:
    assert intervals((1, "active"), (6, "active"), delete_at=(3, 4)) == [("active", 1, 3), ("active", 6, None)]


def test_a_delete_wins_a_tie_and_is_remembered_for_a_key_not_seen_yet() -> None:
    assert intervals((3, "active"), delete_at=(3,)) == []
    assert intervals((1, "active"), (5, "active"), delete_at=(0,)) == [("active", 1, None)]
    assert intervals((1, "active"), delete_at=(2,)) == [("active", 1, 2)]


def test_nothing_of_nothing_and_no_tracked_column() -> None:
    assert history([]).is_empty()
    one = pl.DataFrame({"id": [1, 1], "at": [1, 2]})
    assert scd2(one, keys=["id"], time="at", tracked=[]).rows() == [(1, 1, None)]
