"""Whose an event is, against a search through everything that was ever said; each event by itself."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from lakehouse.scd2 import scd2
from lakehouse.sole import sole
from transforms.product.attribution import ATTRIBUTED, Known, attribute

ZERO = datetime(2026, 1, 10, tzinfo=UTC)
MOMENT = pl.Datetime("us", "UTC")
BACK = 3
"""Hours that a first identify event counts back; here an hour is what a day is there."""

hours = st.integers(0, 12)
people, places, payers = st.sampled_from(["u", "v"]), st.sampled_from(["w", "x"]), st.sampled_from(["c", "d"])
spans = st.tuples(hours, st.one_of(st.none(), st.integers(0, 14)))
identifies = st.lists(st.tuples(st.sampled_from(["a", "b"]), people, hours), max_size=5, unique_by=lambda s: (s[0], s[2]))
memberships = st.lists(st.tuples(people, places, spans), max_size=5)
mappings = st.lists(st.tuples(places, payers, spans), max_size=4)
plans = st.dictionaries(payers, hours)
events = st.lists(
    st.tuples(
        st.one_of(st.none(), st.none(), places),
        st.one_of(st.none(), people),
        st.one_of(st.none(), st.sampled_from(["a", "b"])),
        hours,
    ),
    max_size=12,
)


def at(hour: int | None) -> datetime | None:
    return None if hour is None else ZERO + timedelta(hours=hour)


def intervals(rows: list[tuple[Any, ...]], key: str, value: str) -> pl.DataFrame:
    schema = {key: pl.String, value: pl.String, "valid_from": MOMENT, "valid_to": MOMENT}
    return pl.DataFrame([(k, v, at(start), at(end)) for k, v, (start, end) in rows], schema, orient="row")


def what_is_known(said: list[Any], members: list[Any], mapped: list[Any], paid: dict[str, int]) -> Known:
    stated = pl.DataFrame(
        [(a, u, at(h)) for a, u, h in said], {"anonymous_id": pl.String, "user_id": pl.String, "at": MOMENT}, orient="row"
    )
    customers = sole(
        intervals(mapped, "workspace_id", "customer_id"), keys=["workspace_id"], values=["customer_id"], count="customers"
    )
    timeline = [("platform", c, "sub", "pro", 2, "price", "active", at(h), None) for c, h in paid.items()]
    columns = ("account", "customer_id", "subscription_id", "plan", "plan_rank", "price_id", "billing_status")
    schema = dict.fromkeys(columns, pl.String) | {"plan_rank": pl.Int32, "valid_from": MOMENT, "valid_to": MOMENT}
    return Known(
        scd2(stated, keys=["anonymous_id"], time="at", tracked=["user_id"]),
        timedelta(hours=BACK),
        sole(intervals(members, "user_id", "workspace_id"), keys=["user_id"], values=["workspace_id"], count="workspaces"),
        customers.with_columns(account=pl.lit("platform")),
        pl.DataFrame(timeline, schema, orient="row"),
    )


def searched(
    event: tuple[Any, ...], said: list[Any], members: list[Any], mapped: list[Any], paid: dict[str, int]
) -> tuple[Any, ...]:
    """(attribution, attributed_workspace_id, identified_user_id, customer_id) by the words of docs/product-events.md."""
    workspace, user, device, hour = event
    identified = None

    def held(rows: list[Any], key: str | None) -> set[str]:
        return {v for k, v, (start, end) in rows if k == key and start <= hour and (end is None or hour < end)}

    if workspace is None and user is None:
        named = sorted((h, u) for a, u, h in said if a == device)
        past = [u for h, u in named if h <= hour]
        identified = past[-1] if past else named[0][1] if named and hour >= named[0][0] - BACK else None
    if workspace is None:
        found = held(members, user or identified)
        if len(found) != 1:
            return ("ambiguous" if found else "unmapped_workspace", None, identified, None)
        workspace = found.pop()
    owners = held(mapped, workspace)
    if len(owners) != 1:
        return ("ambiguous" if owners else "unmapped_workspace", workspace, identified, None)
    owner = owners.pop()
    outcome = "resolved" if hour >= paid.get(owner, 99) else "no_subscription"
    return (outcome, workspace, identified, owner)


@given(events, identifies, memberships, mappings, plans)
def test_attribution_is_what_a_search_finds(
    asked: list[Any], said: list[Any], members: list[Any], mapped: list[Any], paid: dict[str, int]
) -> None:
    schema = {"workspace_id": pl.String, "user_id": pl.String, "anonymous_id": pl.String, "occurred_at": MOMENT}
    frame = pl.DataFrame([(*e[:3], at(e[3])) for e in asked], schema, orient="row")
    known = what_is_known(said, members, mapped, paid)
    found = attribute(frame, known)
    wanted = [searched(e, said, members, mapped, paid) for e in asked]
    columns = ("attribution", "attributed_workspace_id", "identified_user_id", "customer_id")
    assert found.select(columns).rows() == wanted
    assert attribute(found, known).equals(found), "what was attributed before does not count"
    alone = [attribute(frame[n], known).select(ATTRIBUTED).row(0) for n in range(min(3, frame.height))]
    assert found.select(ATTRIBUTED).rows()[: len(alone)] == alone
