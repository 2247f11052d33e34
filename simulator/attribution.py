"""Whose an event truly is: the owner of its workspace and the plan in force when it occurred, a column at a time.

Which workspace that is, `simulator.identity.placed` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from simulator.search import begun, row_of
from simulator.timeline import PlanInterval
from simulator.workspaces import Workspace

RESOLVED, UNMAPPED, UNSUBSCRIBED, AMBIGUOUS = "resolved", "unmapped_workspace", "no_subscription", "ambiguous"
PLAN = ("subscription_id", "plan", "price_id", "billing_status")


def owners(events: pl.DataFrame, workspaces: Sequence[Workspace], customers: Sequence[str]) -> pl.DataFrame:
    """Of each event (workspace, occurred_at) the `owner`, as its place in `customers`, and whether there are `two` of them.

    owner: NULL for one that is not among them, for two, and where there is no workspace or the CRM does not know it.
    """
    place = {customer: number for number, customer in enumerate(customers)}
    rows = [
        (w, since * 1000, place.get(owner) if owner and space.mapped else None, owner is None and space.mapped)
        for w, space in enumerate(workspaces)
        for since, owner in space.owners
    ]
    schema = {"workspace": pl.Int64, "since": pl.Int64, "owner": pl.Int64, "two": pl.Boolean}
    table = pl.DataFrame(rows, schema=schema, orient="row")
    known = events["workspace"].cast(pl.Int64).fill_null(-1)
    matched, own = row_of(table, "workspace", known, begun(table, "workspace", "since", known, events["occurred_at"]) - 1)
    return matched.select(owner=pl.when(own).then("owner"), two=pl.when(own).then("two").otherwise(pl.lit(value=False)))


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
    matched, own = row_of(table, "owner", known, begun(table, "owner", "since", known, occurred_at) - 1)
    return matched.select(pl.when(own).then(pl.col(PLAN)))


def attributed(
    events: pl.DataFrame, workspaces: Sequence[Workspace], timelines: Mapping[str, Sequence[PlanInterval]]
) -> pl.DataFrame:
    """Events (of `identity.placed`) with their outcome, `customer_id` and the columns PLAN, by the rules of `truth`."""
    customers = sorted({owner for workspace in workspaces for _, owner in workspace.owners if owner})
    owned = owners(events, workspaces, customers)
    plan = plans(events["occurred_at"], owned["owner"], customers, timelines)
    found = plan.with_columns(customer_id=pl.Series(customers, dtype=pl.String).gather(owned["owner"]))
    outcome = (
        pl.when(events["several"] | owned["two"])
        .then(pl.lit(AMBIGUOUS))
        .when(pl.col("customer_id").is_null())
        .then(pl.lit(UNMAPPED))
        .when(pl.col("subscription_id").is_null())
        .then(pl.lit(UNSUBSCRIBED))
        .otherwise(pl.lit(RESOLVED))
    )
    return events.hstack(found.select("customer_id", *PLAN, outcome.alias("outcome")))
