"""Whose an event is and what plan was in force when it happened: a pure function of the event and of what is known.

The repair of the events that a late truth made wrong calls the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
from pyiceberg.manifest import DataFile

from lakehouse.asof import asof_join
from lakehouse.declarations import load_reference
from lakehouse.keyed import among_sql
from lakehouse.plans import Plan, frame, live_files
from lakehouse.predicates import all_of, any_of, at_least, at_most, is_null, one_of
from lakehouse.queries import files_sql, path_for_duckdb

INPUTS = (
    "product.identifications",
    "product.anonymous_user_history",
    "product.user_workspace_history",
    "billing.workspace_customer_history",
    "billing.plan_timeline",
)

PLANS = ("subscription_id", "plan", "plan_rank", "price_id", "billing_status")

FOUND = ("identified_user_id", "attributed_workspace_id", "workspace_source")

ATTRIBUTED = ("attribution", *FOUND, "account", "customer_id", *PLANS)


@dataclass(frozen=True)
class Known:
    """What is known of who belonged to whom: disjoint intervals of each key, [valid_from, valid_to).

    users: anonymous_id -> user_id (product.anonymous_user_history), and how far back the first of an id counts.
    members: user_id -> workspace_id, workspaces (product.user_workspace_history).
    Of these two at least what concerns the events that name no workspace.
    customers: workspace_id -> account, customer_id, customers (billing.workspace_customer_history).
    plans: account, customer_id -> PLANS (billing.plan_timeline).
    """

    users: pl.DataFrame
    lookback: timedelta
    members: pl.DataFrame
    customers: pl.DataFrame
    plans: pl.DataFrame


def known_for(
    connection: duckdb.DuckDBPyConnection, events: pl.DataFrame, catalog_dir: Path, before: Known | None = None
) -> Known:
    """What is needed to attribute `events`, out of the tables of INPUTS as they are bound in the connection.

    before: what was loaded for other events, of the same tables; what does not depend on the events is taken from it.
    """
    unplaced = events.filter(pl.col("workspace_id").is_null()).select("user_id", "anonymous_id")
    connection.register("__unplaced", unplaced.unique().to_arrow())
    nobody = "" if unplaced.height else "LIMIT 0"  # most batches: then nothing is read
    users = f"SELECT * FROM product.anonymous_user_history SEMI JOIN __unplaced USING (anonymous_id) {nobody}"
    connection.register("__users", (found := frame(connection, users)).to_arrow())
    these = "SELECT user_id FROM __unplaced UNION SELECT user_id FROM __users"
    members = f"SELECT * FROM product.user_workspace_history SEMI JOIN ({these}) USING (user_id) {nobody}"
    return Known(
        found,
        timedelta(days=load_reference(catalog_dir, "identity")["lookback_days"]),
        frame(connection, members),
        before.customers if before else frame(connection, "SELECT * FROM billing.workspace_customer_history"),
        before.plans if before else frame(connection, "SELECT * FROM billing.plan_timeline"),
    )


def known_now(plan: Plan, events: pl.DataFrame) -> Known:
    """The same for a plan. Plans and customers are kept for the next micro-batch: many come before billing changes."""
    made_of = [plan.pinned[name][1] for name in ("billing.workspace_customer_history", "billing.plan_timeline")]
    kept = plan.lake.kept.get("known")
    before = kept[1] if isinstance(kept, tuple) and kept[0] == made_of else None
    known = known_for(plan.connection, events, plan.lake.settings.catalog_dir, before)
    plan.lake.kept["known"] = made_of, known
    return known


def attribute(events: pl.DataFrame, known: Known) -> pl.DataFrame:
    """Give each event its workspace, that workspace's customer and that customer's plan, all as of `occurred_at`.

    A pure function: events (workspace_id, user_id, anonymous_id, occurred_at, ...) -> events with the columns of ATTRIBUTED added
    or replaced, in the same order. Each event is attributed by itself: what stands beside it changes nothing.

    An event without a workspace has that of its user, if the user belongs to exactly one then; without a user, of the user that
    its anonymous id belongs to. Several workspaces, or a workspace that is mapped to several customers: `ambiguous`, and nothing
    is chosen.
    """
    bare = events.drop([c for c in ATTRIBUTED if c in events.columns])
    placed = _placed(bare, known)
    mapped = asof_join(
        placed,
        known.customers.rename({"workspace_id": "attributed_workspace_id"}),
        time="occurred_at",
        keys=["attributed_workspace_id"],
        columns=["account", "customer_id", "customers"],
    )
    found = asof_join(mapped, known.plans, time="occurred_at", keys=["account", "customer_id"], columns=PLANS)
    outcome = (
        pl.when((pl.col("__workspaces") > 1) | (pl.col("customers") > 1))
        .then(pl.lit("ambiguous"))
        .when(pl.col("customer_id").is_null())
        .then(pl.lit("unmapped_workspace"))
        .when(pl.col("billing_status").is_null())
        .then(pl.lit("no_subscription"))
        .otherwise(pl.lit("resolved"))
    )
    account = pl.when(pl.col("customer_id").is_not_null()).then("account")
    return found.with_columns(outcome.alias("attribution"), account).drop("__workspaces", "customers")


def _placed(events: pl.DataFrame, known: Known) -> pl.DataFrame:
    """The events with the columns of FOUND, and `__workspaces`: how many workspaces it could have been."""
    if not events["workspace_id"].null_count():  # most batches: nothing to look up, and no wide column to move
        return events.with_columns(
            identified_user_id=pl.lit(None, pl.String),
            attributed_workspace_id="workspace_id",
            workspace_source=pl.lit("sent"),
            __workspaces=pl.lit(1, pl.Int64),
        )
    narrow = events.select("workspace_id", "user_id", "anonymous_id", "occurred_at").with_row_index("__event")
    unplaced = narrow.filter(pl.col("workspace_id").is_null()).drop("workspace_id")
    named = asof_join(
        unplaced.rename({"user_id": "sent"}),
        looking_back(known.users, known.lookback),
        time="occurred_at",
        keys=["anonymous_id"],
        columns=["user_id"],
    ).with_columns(user_id=pl.coalesce("sent", "user_id"))
    found = asof_join(named, known.members, time="occurred_at", keys=["user_id"], columns=["workspace_id", "workspaces"]).select(
        "__event",
        "workspaces",
        pl.col("workspace_id").alias("found"),
        pl.when(pl.col("sent").is_null()).then("user_id").alias("identified_user_id"),
        pl.when(pl.col("sent").is_null()).then(pl.lit("identity")).otherwise(pl.lit("membership")).alias("way"),
    )
    each = narrow.join(found, on="__event", how="left", maintain_order="left").select(
        "identified_user_id",
        pl.coalesce("workspace_id", "found").alias("attributed_workspace_id"),
        pl.when(pl.col("workspace_id").is_not_null())
        .then(pl.lit("sent"))
        .when(pl.col("found").is_not_null())
        .then("way")
        .alias("workspace_source"),
        pl.col("workspaces").alias("__workspaces"),
    )
    return events.hstack(each)


def looking_back(users: pl.DataFrame, lookback: timedelta) -> pl.DataFrame:
    """The intervals of product.anonymous_user_history, the first of each anonymous id begun that much earlier.

    What a device did before anybody logged in is taken for the user who then did, as Amplitude does ("User ID follows anonymous
    events": https://amplitude.com/docs/data/sources/amplitude-id-assignment) and PostHog
    (https://posthog.com/docs/getting-started/identify-users). Between two users it is the earlier one's. Unlike theirs it has a
    limit, so that an identify event changes no more than the days that can be processed again.
    """
    first = pl.col("valid_from") == pl.col("valid_from").min().over("anonymous_id")
    return users.with_columns(valid_from=pl.when(first).then(pl.col("valid_from") - lookback).otherwise("valid_from"))


@dataclass(frozen=True)
class Dirty:
    """What may be attributed wrongly now, each from when on. workspaces: workspace_id, since; of events without a workspace also
    users: user_id, since; anonymous: anonymous_id, since."""

    workspaces: pl.DataFrame
    users: pl.DataFrame
    anonymous: pl.DataFrame

    def is_empty(self) -> bool:
        """Nothing was learnt that an event already attributed could depend on."""
        return self.workspaces.is_empty() and self.users.is_empty() and self.anonymous.is_empty()


def _dirty(plan: Plan, known: Known) -> Dirty:
    """Workspaces whose events, and users and anonymous ids whose events without a workspace, may be wrong now.

    They come from what was recorded in the offset ranges consumed, so that an expired snapshot cannot lose them: a billing
    version changes its customer's timeline from its own second on, a CRM row its workspace or user from when it took effect, an
    identify event its anonymous id from its own time on, and as far back as a first one counts.
    """
    versions = pl.DataFrame(plan.new_rows("billing.event_versions", "object_type, account, customer_id, created_at"))
    billed = (
        versions.filter(pl.col("object_type") == "subscription")
        .group_by("account", "customer_id")
        .agg(pl.col("created_at").min().alias("since"))
    )
    crm = pl.DataFrame(plan.new_rows("raw.crm_workspaces", "workspace_id, effective_at"))
    members = pl.DataFrame(plan.new_rows("raw.crm_memberships", "user_id, effective_at"))
    identified = pl.DataFrame(plan.new_rows("product.identifications", "anonymous_id, occurred_at"))
    by_billing = known.customers.join(billed, on=["account", "customer_id"]).select("workspace_id", "since")
    by_crm = crm.select("workspace_id", pl.col("effective_at").alias("since"))
    return Dirty(
        pl.concat([by_billing, by_crm]).group_by("workspace_id").agg(pl.col("since").min()),
        members.group_by("user_id").agg(pl.col("effective_at").min().alias("since")),
        identified.group_by("anonymous_id").agg((pl.col("occurred_at").min() - known.lookback).alias("since")),
    )


def _suspect_files(plan: Plan, dirty: Dirty) -> tuple[Sequence[DataFile], Sequence[DataFile]]:
    """The live files that may hold an event of what is dirty: one that names a workspace, one that names none."""
    named: Sequence[DataFile] = []
    nameless = []
    if not dirty.workspaces.is_empty():
        since, ids = at_least("occurred_at", min(dirty.workspaces["since"])), dirty.workspaces["workspace_id"].to_list()
        named = live_files(plan, all_of((since, one_of("workspace_id", ids))))
        nameless.append(all_of((since, one_of("attributed_workspace_id", ids))))
    for column, ids_since in (("user_id", dirty.users), ("identified_user_id", dirty.users), ("anonymous_id", dirty.anonymous)):
        if not ids_since.is_empty():
            theirs = one_of(column, ids_since.to_series(0).to_list())
            nameless.append(all_of((at_least("occurred_at", min(ids_since["since"])), theirs)))
    return named, live_files(plan, all_of((is_null("workspace_id"), any_of(nameless)))) if nameless else []


def _with_changes(plan: Plan, dirty: Dirty, named: Sequence[DataFile], nameless: Sequence[DataFile]) -> set[str]:
    """Which of `_suspect_files` hold an event that is attributed otherwise now, by the paths that DuckDB gives.

    Events that name a workspace are sorted by it, so of their files only the row groups that can hold a dirty one are read.
    """
    parts = []
    if named:
        workspaces = pa.chunked_array([dirty.workspaces["workspace_id"].to_arrow()])
        parts.append(f"FROM {among_sql(plan.table, named, 'workspace_id', workspaces)} WHERE workspace_id IS NOT NULL")
    if nameless:
        parts.append(f"FROM {files_sql(plan.table, nameless)} WHERE workspace_id IS NULL")
    if not parts:
        return set()
    connection = plan.connection
    connection.register("__dirty_workspaces", dirty.workspaces.to_arrow())
    connection.register("__dirty_users", dirty.users.to_arrow())
    connection.register("__dirty_anonymous", dirty.anonymous.to_arrow())
    suspects = frame(
        connection,
        f"""
        SELECT
            e.filename, e.event_id, e.workspace_id, e.user_id, e.anonymous_id, e.occurred_at,
            {", ".join(f"e.{c}" for c in ATTRIBUTED)}
        FROM ({" UNION ALL ".join(parts)}) e
        LEFT JOIN __dirty_workspaces w ON w.workspace_id = coalesce(e.workspace_id, e.attributed_workspace_id)
        LEFT JOIN __dirty_users u ON e.workspace_id IS NULL AND u.user_id = coalesce(e.user_id, e.identified_user_id)
        LEFT JOIN __dirty_anonymous a ON e.workspace_id IS NULL AND e.user_id IS NULL AND a.anonymous_id = e.anonymous_id
        WHERE e.occurred_at >= w.since OR e.occurred_at >= u.since OR e.occurred_at >= a.since
        """,
    )
    fresh = attribute(suspects, known_now(plan, suspects))
    return set(fresh.filter(pl.any_horizontal([fresh[c].ne_missing(suspects[c]) for c in ATTRIBUTED]))["filename"])


def rewrites(plan: Plan, known: Known, replaced: pl.DataFrame) -> tuple[Sequence[DataFile], pl.DataFrame | None]:
    """The live files in which an event's attribution changes or a copy is replaced, and their corrected rows.

    known: as loaded for the batch; its users and members are those of the batch's own events, others are looked up here.
    """
    dirty = _dirty(plan, known)
    if plan.base is None or (dirty.is_empty() and replaced.is_empty()):
        return (), None
    connection = plan.connection
    named, nameless = _suspect_files(plan, dirty)
    hit = _with_changes(plan, dirty, named, nameless)
    files = {path_for_duckdb(f.file_path): f for f in (*named, *nameless)}
    connection.register("__replaced", replaced.to_arrow())
    if not replaced.is_empty():
        when = replaced["occurred_at"].to_list()  # where the known copies are: their days bound the files to look into
        where = all_of(
            (
                one_of("event_id", replaced["event_id"].to_list()),
                at_least("occurred_at", min(when)),
                at_most("occurred_at", max(when)),
            )
        )
        holding = {path_for_duckdb(f.file_path): f for f in live_files(plan, where)}
        files |= holding
        there = f"FROM {files_sql(plan.table, holding.values())} SEMI JOIN __replaced USING (event_id, occurred_at)"
        hit |= set(frame(connection, f"SELECT DISTINCT filename {there}")["filename"])
    if not hit:
        return (), None
    remove = [files[path] for path in sorted(hit)]
    kept = frame(
        connection,
        f"SELECT * EXCLUDE (filename) FROM {files_sql(plan.table, remove)} ANTI JOIN __replaced USING (event_id, occurred_at)",
    )
    return remove, attribute(kept, known_now(plan, kept))
