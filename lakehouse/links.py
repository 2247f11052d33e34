"""Links: which Stripe objects belong to which, told at both ends, so that whoever has one end finds the other without a scan.

A customer's intervals lie by subscription, a charge's refunds by refund: a batch that touches a few of them asks here where to
look. Links say where, never what: they may name more than there is, and are what was told in any version, be it outdated. So a
table that is built by them is the same as one that is built from everything; the cost grows with the batch. See docs/decisions,
"Links".
"""

from __future__ import annotations

import polars as pl
from pyiceberg.table import Table

from lakehouse.keyed import holding_sql
from lakehouse.plans import Plan, frame
from lakehouse.positions import vector_of

OBJECT = ["account", "object_id"]
PARENT, CHILD = "parent", "child"
"""A row says of its object that `linked_id` is its parent (a refund's charge), or its child."""


def links_of(plan: Plan) -> Table | None:
    """The table of links, if it knows all that the plan may see; None if not: then everything has to be read, to the same end.

    It may be ahead, for more links are no harm. What is built whole needs everything anyway; and a replay lies below the
    positions, so these do not say what it knows.
    """
    name = plan.declared.build.links
    table = plan.lake.find(name) if name and plan.base is not None and plan.again is None else None
    if name is None or table is None or table.current_snapshot() is None:
        return None
    known = vector_of(table.metadata, name)
    return table if all(known.get(key, 0) >= offset for key, offset in plan.reached.items()) else None


def children(plan: Plan, parents: pl.DataFrame) -> pl.DataFrame | None:
    """The objects that belong to the parents; both with the columns account and object_id. None if no links can be asked."""
    table = links_of(plan)
    return None if table is None else _ends(_told(plan, table, parents), CHILD)


def family(plan: Plan, objects: pl.DataFrame, depth: int) -> pl.DataFrame | None:
    """The objects, those that they belong to (up to `depth` links up), and all that belongs to any of these (as far down).

    With the columns account and object_id, each once. None if no links can be asked.
    """
    table = links_of(plan)
    if table is None:
        return None
    members = fresh = objects.select(OBJECT).unique()
    told: list[pl.DataFrame] = []
    for relation in (*[PARENT] * depth, *[CHILD] * depth):
        if not fresh.is_empty():
            told.append(_told(plan, table, fresh))
        fresh = _ends(pl.concat(told), relation).join(members, on=OBJECT, how="anti")
        members = pl.concat([members, fresh])
    return members


def _told(plan: Plan, table: Table, objects: pl.DataFrame) -> pl.DataFrame:
    """The links at these objects."""
    snapshot = table.current_snapshot()
    assert snapshot is not None
    asked = objects.to_arrow()
    plan.connection.register("__asked", asked)
    held = holding_sql(table, snapshot.snapshot_id, "object_id", asked.column("object_id"))
    found = f"SELECT account, object_id, relation, linked_id FROM {held} SEMI JOIN __asked USING (account, object_id)"
    return frame(plan.connection, found)


def _ends(told: pl.DataFrame, relation: str) -> pl.DataFrame:
    """What the links of that relation lead to, each once."""
    return told.filter(pl.col("relation") == relation).select("account", pl.col("linked_id").alias("object_id")).unique()
