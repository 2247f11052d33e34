"""Whose an event truly is: the owner of its workspace and the plan in force when it occurred, a column at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from simulator.timeline import PlanInterval
from simulator.workspaces import Workspace

RESOLVED, UNMAPPED, UNSUBSCRIBED = "resolved", "unmapped_workspace", "no_subscription"
PLAN = ("subscription_id", "plan", "price_id", "billing_status")


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


def plans(
    occurred_at: pl.Series, owner: pl.Series, customers: Sequence[str], timelines: Mapping[str, Sequence[PlanInterval]]
) -> pl.DataFrame:
    """The plan interval of each (place in `customers`, time): columns PLAN, NULL before the owner's first one."""
    rows = [
        (number, i.valid_from * 1000, i.subscription_id, i.plan, i.price_id, i.billing_status)
        for number, customer in enumerate(customers)
        for i in timelines.get(customer, ())
    ]
    schema = {"owner": pl.Int64, "since": pl.Int64} | dict.fromkeys(PLAN, pl.String)
    table = pl.DataFrame(rows, schema=schema, orient="row")
    known = owner.fill_null(-1)
    found = _key(table["owner"], table["since"]).search_sorted(_key(known, occurred_at), side="right").cast(pl.Int64) - 1
    matched = table[found.clip(lower_bound=0)]
    own = (found >= 0) & (matched["owner"] == known)
    return matched.select(pl.when(own).then(pl.col(PLAN)))


def attributed(
    events: pl.DataFrame, workspaces: Sequence[Workspace], timelines: Mapping[str, Sequence[PlanInterval]]
) -> pl.DataFrame:
    """Events (workspace, occurred_at, ...) with their outcome, `customer_id` and the columns PLAN, by the rules of `truth`."""
    customers = sorted({owner for workspace in workspaces for _, owner in workspace.owners})
    owner = owners(events, workspaces, customers)
    mapped = pl.Series([w.mapped for w in workspaces]).gather(events["workspace"])
    plan = plans(events["occurred_at"], owner, customers, timelines)
    found = plan.with_columns(customer_id=pl.Series(customers, dtype=pl.String).gather(owner))
    resolved = pl.col("subscription_id").is_not_null()
    outcome = pl.when(~mapped).then(pl.lit(UNMAPPED)).when(resolved).then(pl.lit(RESOLVED)).otherwise(pl.lit(UNSUBSCRIBED))
    return events.hstack(found.select(pl.when(mapped).then(pl.col("customer_id", *PLAN)), outcome.alias("outcome")))
