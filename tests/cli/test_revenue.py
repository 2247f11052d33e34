"""`lakehouse revenue` on a played world: the readings agree where they must, and say no where they cannot know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from command import Ran

pytestmark = pytest.mark.usefixtures("world")


def totals(ran: Ran) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for row in ran.fine().json["rows"]:
        found[row["basis"], row["currency"]] += row["amount_minor"]
    return found


def test_the_readings_differ_by_day_and_never_in_sum(call: Callable[..., Ran]) -> None:
    booked = totals(call("revenue", "--json"))
    assert booked == totals(call("revenue", "--reading", "restated", "--json")) != {}
    assert booked == totals(call("revenue", "--by", "day", "--json")) == totals(call("revenue", "--by", "type", "--json"))
    assert {basis for basis, _ in booked} == {"billed", "cash"}
    assert {basis for basis, _ in totals(call("revenue", "--basis", "cash", "--json"))} == {"cash"}


def test_one_month_is_its_rows_of_all_months(call: Callable[..., Ran]) -> None:
    every = call("revenue", "--json").fine().json["rows"]
    month = every[0]["month"]
    assert call("revenue", "--month", month, "--json").fine().json["rows"] == [r for r in every if r["month"] == month]
    assert "closed" in every[0]


def test_as_known_needs_a_time_that_is_known(call: Callable[..., Ran]) -> None:
    known = call("revenue", "--json").fine().json["known_until"]
    assert call("revenue", "--reading", "as-known", "--at", known, "--json").fine().json["at"] == known
    assert f"as recorded by {known[:10]}" in call("revenue", "--at", known).fine().out
    call("revenue", "--reading", "as-known").failed(2, "as known when? --at")
    call("revenue", "--at", "2099-01-01").failed(2, "later than what the books know")
    call("revenue", "--at", "soon").failed(2, "is neither a snapshot id nor a time")
    call("revenue", "--month", "2026-13").failed(2, "is not a month like 2026-02")


def test_an_empty_lake_says_how_to_fill_it(call: Callable[..., Ran], tmp_path) -> None:
    call("revenue", LAKEHOUSE_HOME=str(tmp_path / "empty")).failed(2, "holds nothing yet; fill it: lakehouse run")
