"""SCD2 as a function of the set of versions: against a brute-force evaluation of every point in time.

The incremental form must give the same, whatever comes in which batch, and however little of what is known it is shown.
"""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakehouse.errors import Terminal, UsageError
from lakehouse.scd2 import scd2, scd2_update

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


# --- incremental -------------------------------------------------------------------------------------------------------

ROLES = {"keys": ["account", "id"], "time": "at", "sequence": ["seq"], "tracked": ["status", "seats"], "untracked": ["note"]}
INTERVAL = ["account", "id", "status", "seats", "note", "valid_from", "valid_to"]


def near(history: pl.DataFrame, known: list[Row], new: list[Row]) -> tuple[pl.DataFrame, list[Row]]:
    """The least that `scd2_update` has to be shown, by its own documentation."""
    keys = {r[:2] for r in new}
    anchors = {}
    for key in keys:
        first = min(r[2] for r in new if r[:2] == key)
        anchors[key] = max((r[2] for r in known if r[:2] == key and r[2] < first), default=None)
    versions = [r for r in known if r[:2] in keys and (anchors[r[:2]] is None or r[2] >= anchors[r[:2]])]
    rows = [r for r in history.rows() if r[:2] in keys and (anchors[r[:2]] is None or r[6] is None or r[6] > anchors[r[:2]])]
    return pl.DataFrame(rows, history.schema, orient="row"), versions


def applied(history: pl.DataFrame, remove: pl.DataFrame, add: pl.DataFrame) -> pl.DataFrame:
    left = history.join(remove, on=INTERVAL, how="anti", nulls_equal=True)
    assert left.height == history.height - remove.height, "each interval removed was there"
    return pl.concat([left, add]).sort("account", "id", "valid_from")


@settings(max_examples=600)
@given(st.lists(row, max_size=14), st.data())
def test_batches_of_any_split_give_what_a_full_rebuild_gives(rows: list[Row], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    batches = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    found, known = history([]), list[Row]()
    for batch in batches:
        shown = near(found, known, batch) if data.draw(st.booleans()) else (found, known)
        change = scd2_update(shown[0], frame(shown[1]), frame(batch), **ROLES, deleted="gone")  # type: ignore[arg-type]
        touched = {r[:2] for r in batch}
        assert {r[:2] for r in change.remove.rows()} | {r[:2] for r in change.add.rows()} <= touched
        assert change.remove.join(change.add, on=INTERVAL, nulls_equal=True).is_empty(), "only what differs"
        found = applied(found, change.remove, change.add)
        known += batch
    assert found.equals(history(rows))


@settings(max_examples=200)
@given(versions, st.data())
def test_what_is_known_already_changes_nothing(rows: list[Row], data: st.DataObject) -> None:
    again = data.draw(st.lists(st.sampled_from(rows), max_size=5)) if rows else []
    change = scd2_update(history(rows), frame(rows), frame(again), **ROLES, deleted="gone")  # type: ignore[arg-type]
    assert change.remove.is_empty()
    assert change.add.is_empty()


def test_a_new_version_after_all_others_touches_the_open_interval_alone() -> None:
    rows: list[Row] = [("a", 0, at, 0, status, 1, None, False) for at, status in ((1, "active"), (3, "past_due"), (5, "active"))]
    later: Row = ("a", 0, 9, 0, "past_due", 1, None, False)
    change = scd2_update(history(rows)[2:], frame(rows[2:]), frame([later]), **ROLES, deleted="gone")  # type: ignore[arg-type]
    assert change.remove.select("status", "valid_from", "valid_to").rows() == [("active", 5, None)]
    assert change.add.select("status", "valid_from", "valid_to").rows() == [("active", 5, 9), ("past_due", 9, None)]


# --- odd frames --------------------------------------------------------------------------------------------------------


def test_frames_that_cannot_be_are_refused_by_name() -> None:
    one = pl.DataFrame({"id": [1], "at": [1], "v": ["x"], "gone": ["no"], "valid_to": [3]})
    with pytest.raises(UsageError, match="no column 'nope'; there are id, at"):
        scd2(one, keys=["id"], time="at", tracked=["nope"])
    with pytest.raises(UsageError, match="'v' is named in two roles"):
        scd2(one, keys=["id"], time="at", tracked=["v"], untracked=["v"])
    with pytest.raises(UsageError, match="keys is a list of columns"):
        scd2(one, keys="id", time="at", tracked=["v"])
    with pytest.raises(UsageError, match="keys is empty"):
        scd2(one, keys=[], time="at", tracked=["v"])
    with pytest.raises(UsageError, match="called 'valid_to'"):
        scd2(one, keys=["id"], time="at", tracked=["valid_to"])
    with pytest.raises(UsageError, match="'gone' is String, not boolean"):
        scd2(one, keys=["id"], time="at", tracked=["v"], deleted="gone")
    with pytest.raises(UsageError, match="the history has no column 'valid_from'"):
        scd2_update(one, one, one, keys=["id"], time="at", tracked=["v"])


def test_arrow_nested_values_dates_and_several_sequence_columns() -> None:
    day = pl.date_range(pl.date(2026, 1, 1), pl.date(2026, 1, 4), eager=True)
    rows = pl.DataFrame(
        {"id": ["a"] * 4, "day": day, "tags": [["x"], ["x"], None, ["y", "z"]], "major": [1, 1, 1, 1], "minor": [0, 0, 0, 0]}
    )
    later = rows[3:].with_columns(pl.Series("tags", [["y"]]), pl.Series("minor", [1]))
    found = scd2(pl.concat([later, rows]).to_arrow(), keys=["id"], time="day", sequence=["major", "minor"], tracked=["tags"])
    assert found["tags"].to_list() == [["x"], None, ["y"]]
    assert found["valid_from"].to_list() == [day[0], day[2], day[3]]
    assert found.schema["valid_to"] == pl.Date


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
