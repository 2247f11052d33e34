"""The plan in force when an event happened, and the repair of the events that a late truth made wrong."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
from pyiceberg.manifest import DataFile

from lakehouse.asof import asof_join
from lakehouse.plans import Plan, frame, live_files
from lakehouse.predicates import all_of, at_least, at_most, one_of
from lakehouse.queries import files_sql, path_for_duckdb

ATTRIBUTED = ("attribution", "account", "customer_id", "subscription_id", "plan", "plan_rank", "price_id", "billing_status")


def attribute(events: pl.DataFrame, workspaces: pl.DataFrame, timeline: pl.DataFrame) -> pl.DataFrame:
    """Give each event the customer of its workspace and that customer's plan, both as of `occurred_at`.

    A pure function: events (workspace_id, occurred_at, ...), workspaces (billing.workspace_customer_history), timeline
    (billing.plan_timeline) -> events with the columns of ATTRIBUTED added or replaced, in the same order.
    """
    bare = events.drop([c for c in ATTRIBUTED if c in events.columns])
    mapped = asof_join(bare, workspaces, time="occurred_at", keys=["workspace_id"], columns=["account", "customer_id"])
    found = asof_join(
        mapped,
        timeline,
        time="occurred_at",
        keys=["account", "customer_id"],
        columns=["subscription_id", "plan", "plan_rank", "price_id", "billing_status"],
    )
    outcome = (
        pl.when(pl.col("customer_id").is_null())
        .then(pl.lit("unmapped_workspace"))
        .when(pl.col("billing_status").is_null())
        .then(pl.lit("no_subscription"))
        .otherwise(pl.lit("resolved"))
    )
    return found.with_columns(outcome.alias("attribution"))


def _dirty(plan: Plan, workspaces: pl.DataFrame) -> pl.DataFrame:
    """Workspaces whose events may be wrong now, each from when on: columns workspace_id, since.

    They come from what was recorded in the offset ranges consumed, so that an expired snapshot cannot lose them: a
    billing version changes its customer's timeline from its own second on, a CRM row its workspace from when it took effect.
    """
    versions = pl.DataFrame(plan.new_rows("billing.event_versions", "object_type, account, customer_id, created_at"))
    customers = (
        versions.filter(pl.col("object_type") == "subscription")
        .group_by("account", "customer_id")
        .agg(pl.col("created_at").min().alias("since"))
    )
    crm = pl.DataFrame(plan.new_rows("raw.crm_workspaces", "workspace_id, effective_at"))
    by_billing = workspaces.join(customers, on=["account", "customer_id"]).select("workspace_id", "since")
    by_crm = crm.select("workspace_id", pl.col("effective_at").alias("since"))
    return pl.concat([by_billing, by_crm]).group_by("workspace_id").agg(pl.col("since").min())


def rewrites(
    plan: Plan, workspaces: pl.DataFrame, timeline: pl.DataFrame, replaced: pl.DataFrame
) -> tuple[Sequence[DataFile], pl.DataFrame | None]:
    """The live files in which an event's attribution changes or a copy is replaced, and their corrected rows."""
    dirty = _dirty(plan, workspaces)
    if plan.base is None or (dirty.is_empty() and replaced.is_empty()):
        return (), None
    connection = plan.connection
    connection.register("__dirty", dirty.to_arrow())
    connection.register("__replaced", replaced.to_arrow())
    found: list[DataFile] = []
    if not dirty.is_empty():
        where = all_of((at_least("occurred_at", min(dirty["since"])), one_of("workspace_id", dirty["workspace_id"].to_list())))
        found += live_files(plan, where)
    if not replaced.is_empty():
        when = replaced["occurred_at"].to_list()  # where the known copies are: their days bound the files to look into
        where = all_of(
            (
                one_of("event_id", replaced["event_id"].to_list()),
                at_least("occurred_at", min(when)),
                at_most("occurred_at", max(when)),
            )
        )
        found += live_files(plan, where)
    files = {path_for_duckdb(f.file_path): f for f in found}
    if not files:
        return (), None
    suspects = frame(
        connection,
        f"SELECT e.filename, e.event_id, e.workspace_id, e.occurred_at, {', '.join(f'e.{c}' for c in ATTRIBUTED)} "
        f"FROM {files_sql(plan.table, files)} e JOIN __dirty d "
        "ON d.workspace_id = e.workspace_id AND e.occurred_at >= d.since",
    )
    fresh = attribute(suspects, workspaces, timeline).select(suspects.columns)
    changed = fresh.filter(pl.any_horizontal([fresh[c].ne_missing(suspects[c]) for c in ATTRIBUTED]))
    stale = frame(
        connection,
        f"SELECT DISTINCT filename FROM {files_sql(plan.table, files)} SEMI JOIN __replaced USING (event_id, occurred_at)",
    )
    hit = sorted({*changed["filename"], *stale["filename"]})
    if not hit:
        return (), None
    remove = [files[path] for path in hit]
    kept = frame(
        connection,
        f"SELECT * EXCLUDE (filename) FROM {files_sql(plan.table, hit)} ANTI JOIN __replaced USING (event_id, occurred_at)",
    )
    return remove, attribute(kept, workspaces, timeline)
