"""Whose an event truly is: the owner of its workspace and the plan in force when it occurred, a column at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from simulator.timeline import PlanInterval
from simulator.workspaces import Workspace


def _key(group: pl.Series, ms: pl.Series) -> pl.Series:
    """One sortable number of a group and a time (epoch ms stay below 2**42 until the year 2109)."""
    return group.cast(pl.Int64) * (1 << 42) + ms


def owners(events: pl.DataFrame, workspaces: Sequence[Workspace], customers: Sequence[str]) -> pl.Series:
    """Place in `customers` of the owner at `occurred_at`; NULL for one that is not among them."""
    place = {customer: number for number, customer in enumerate(customers)}
    rows = [(w, since * 1000, place.get(owner)) for w, space in enumerate(workspaces) for since, owner in space.owners]
    table = pl.DataFrame(rows, schema={"workspace": pl.Int64, "since": pl.Int64, "owner": pl.Int64}, orient="row")
    found = _key(table["workspace"], table["since"]).search_sorted(_key(events["workspace"], events["occurred_at"]), side="right")
    return table["owner"].gather(found - 1)


def plans(occurred_at: pl.Series, owner: pl.Series, timelines: Mapping[str, Sequence[PlanInterval]]) -> pl.DataFrame:
    """The plan interval of each (owner, time); NULLs before the owner's first one."""
    rows = [
        (number, i.valid_from * 1000, i.stripe_customer_id, i.subscription_id, i.plan, i.billing_status)
        for number, customer in enumerate(sorted(timelines))
        for i in timelines[customer]
    ]
    schema = {"owner": pl.Int64, "since": pl.Int64} | dict.fromkeys(
        ("stripe_customer_id", "subscription_id", "plan", "billing_status"), pl.String
    )
    table = pl.DataFrame(rows, schema=schema, orient="row")
    known = owner.fill_null(-1)
    found = _key(table["owner"], table["since"]).search_sorted(_key(known, occurred_at), side="right").cast(pl.Int64) - 1
    matched = table[found.clip(lower_bound=0)]
    own = (found >= 0) & (matched["owner"] == known)
    return matched.select(pl.when(own).then(pl.col(pl.String)))
