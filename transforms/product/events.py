"""product.events: clean, deduplicated events, each with the plan and billing status in force when it happened.

One pass a micro-batch: parse, refuse the bad rows one by one, deduplicate, attribute, write. The same commit repairs the
events that late billing or a late CRM row made wrong: only those in dirty ranges are looked at, only files that really
change are written again.
"""

from __future__ import annotations

from collections.abc import Sequence

import duckdb
import polars as pl
from pyiceberg.manifest import DataFile

from lakehouse.asof import asof_join
from lakehouse.commit import scope_of
from lakehouse.plans import Plan, Staged, live_files
from lakehouse.predicates import all_of, at_least, at_most, one_of
from lakehouse.queries import bind_sql, files_sql, path_for_duckdb
from lakehouse.staging import stage

INPUTS = (
    "raw.product_events",
    "raw.crm_workspaces",
    "billing.event_versions",
    "billing.plan_timeline",
    "billing.workspace_customer_history",
)

# Top-level fields of an event: which must be JSON strings, which are kept as JSON text, which are numbers.
TEXT = (
    "event_id", "event_name", "occurred_at", "sent_at", "workspace_id", "user_id", "anonymous_id", "session_id", "feature",
    "platform", "app_version", "country", "ip", "user_agent",
)  # fmt: skip
NESTED = ("properties", "context")
NUMBERS = ("schema_version",)
FIELDS = (*TEXT, *NESTED, *NUMBERS)
REQUIRED = ("event_id", "event_name", "occurred_at")

# An instant with its zone; anything else (no zone, an epoch number) is refused rather than guessed.
INSTANT = r"^\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}:\d{2}(\.\d{1,9})?(Z|[+-]\d{2}(:?\d{2})?)$"

# Normal up to 72 h late, accepted and flagged up to 30 days, else (or more than 10 min ahead) refused.
LATE, TOO_LATE, TOO_EARLY = "INTERVAL 72 HOUR", "INTERVAL 30 DAY", "INTERVAL 10 MINUTE"

ATTRIBUTED = ("attribution", "account", "customer_id", "subscription_id", "plan", "plan_rank", "price_id", "billing_status")


def _parse_sql() -> str:
    paths = ", ".join(f"'$.{f}'" for f in FIELDS)
    at = {f: i for i, f in enumerate(FIELDS, start=1)}
    values = ", ".join(f'v[{at[f]}] AS "{f}"' for f in (*TEXT, *NESTED) if not f.endswith("_at"))
    missing = " ".join(f"WHEN v[{at[f]}] IS NULL THEN 'missing_{f}'" for f in REQUIRED)
    wrong = " ".join(f"WHEN t[{at[f]}] NOT IN ('VARCHAR', 'NULL') THEN 'wrong_type_{f}'" for f in TEXT)
    declared = "{" + ", ".join(f'"{f}": null' for f in FIELDS) + "}"
    return f"""
    CREATE OR REPLACE TEMP TABLE parsed AS
    WITH decoded AS (
        SELECT topic, partition, "offset", received_at, payload IS NULL AS tombstone, try(decode(payload)) AS body
        FROM raw.product_events
    ),
    checked AS (
        SELECT *, CASE WHEN json_valid(body) THEN json_type(body) = 'OBJECT' ELSE false END AS is_object FROM decoded
    ),
    fields AS (
        SELECT
            topic, partition, "offset", received_at, tombstone, is_object,
            json_extract_string(CASE WHEN is_object THEN body END, [{paths}]) AS v,
            json_type(CASE WHEN is_object THEN body END, [{paths}]) AS t,
            CASE WHEN is_object AND len(list_filter(json_keys(body), lambda k: NOT list_contains($fields, k))) > 0
                THEN CAST(json_merge_patch(body, '{declared}') AS VARCHAR) END AS extra
        FROM checked
    ),
    typed AS (
        SELECT
            topic, partition, "offset", received_at, tombstone, is_object, v, t, extra, {values},
            CASE WHEN regexp_matches(v[{at["occurred_at"]}], '{INSTANT}')
                THEN TRY_CAST(v[{at["occurred_at"]}] AS TIMESTAMPTZ) END AS occurred_at,
            CASE WHEN regexp_matches(v[{at["sent_at"]}], '{INSTANT}')
                THEN TRY_CAST(v[{at["sent_at"]}] AS TIMESTAMPTZ) END AS sent_at,
            TRY_CAST(v[{at["schema_version"]}] AS INTEGER) AS schema_version
        FROM fields
    )
    SELECT
        * EXCLUDE (v, t, tombstone, is_object),
        epoch_ms(received_at) // 1000 - epoch_ms(occurred_at) // 1000 AS lateness_seconds,
        received_at - occurred_at > {LATE} AS late,
        CASE
            WHEN tombstone THEN 'tombstone'
            WHEN NOT is_object THEN 'not_json'
            {missing}
            {wrong}
            WHEN occurred_at IS NULL THEN 'bad_occurred_at'
            WHEN occurred_at < received_at - {TOO_LATE} THEN 'too_late'
            WHEN occurred_at > received_at + {TOO_EARLY} THEN 'from_the_future'
        END AS reason
    FROM typed
    """


# Of the copies of one event the first receipt counts, whatever the order and the split into batches.
UNIQUE = """
SELECT * EXCLUDE (reason) FROM parsed WHERE reason IS NULL
QUALIFY row_number() OVER (PARTITION BY event_id ORDER BY received_at, topic, partition, "offset") = 1
"""


# Events of the batch that the table has already; `precedes`: the new copy was received before the one that is there.
KNOWN = """
SELECT
    k.event_id, k.occurred_at,
    (e.received_at, e.topic, e.partition, e."offset") < (k.received_at, k.topic, k.partition, k."offset") AS precedes
FROM product.events AS k JOIN __events AS e ON e.event_id = k.event_id
WHERE k.occurred_at >= $first AND k.occurred_at <= $last
"""


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


def plan(plan: Plan) -> Staged:
    """Stage one micro-batch: new events, and the files that repair or an earlier copy of an event changes."""
    connection = plan.connection
    bind_sql(connection, "raw.product_events", plan.new_rows_sql("raw.product_events"))
    plan.bind(["billing.plan_timeline", "billing.workspace_customer_history"])
    connection.execute(_parse_sql(), {"fields": list(FIELDS)})
    rejected = connection.execute(
        'SELECT topic, partition, "offset", received_at, reason, NULL::VARCHAR AS detail FROM parsed WHERE reason IS NOT NULL'
    ).to_arrow_table()
    dead = plan.reject(rejected)

    workspaces = _frame(connection, "SELECT * FROM billing.workspace_customer_history")
    timeline = _frame(connection, "SELECT * FROM billing.plan_timeline")
    events, replaced = _without_known(plan, _frame(connection, UNIQUE))
    events = attribute(events, workspaces, timeline)
    remove, rewritten = _rewrites(plan, workspaces, timeline, replaced)
    columns = plan.declared.column_names
    added = pl.concat(
        [events.select(columns), *([rewritten.select(columns)] if rewritten is not None else [])], how="vertical_relaxed"
    )
    files = stage(plan.table, plan.declared, added.to_arrow())
    new = connection.execute("SELECT count(*) FROM parsed").fetchall()[0][0]
    return Staged(files, remove, scope_of(files), new_input_rows=new, rows=added.height, rejected=dead)


def _frame(connection: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, object] | None = None) -> pl.DataFrame:
    return pl.DataFrame(connection.execute(sql, parameters).to_arrow_table())


def _without_known(plan: Plan, events: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Leave out events that the table has from an earlier receipt; (what remains, known ids that a new copy precedes).

    A copy carries the same `occurred_at` and workspace, so only the days of the new events are looked into.
    """
    nothing = pl.DataFrame(schema={"event_id": pl.String, "occurred_at": events.schema["occurred_at"]})
    if plan.base is None or events.is_empty():
        return events, nothing
    plan.bind_own()
    plan.connection.register("__events", events.select("event_id", "received_at", "topic", "partition", "offset").to_arrow())
    known = _frame(plan.connection, KNOWN, {"first": min(events["occurred_at"]), "last": max(events["occurred_at"])})
    later = known.filter(~pl.col("precedes"))
    return events.join(later, on="event_id", how="anti"), known.filter("precedes").select("event_id", "occurred_at")


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


def _rewrites(
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
    suspects = _frame(
        connection,
        f"SELECT e.filename, e.event_id, e.workspace_id, e.occurred_at, {', '.join(f'e.{c}' for c in ATTRIBUTED)} "
        f"FROM {files_sql(plan.table, files)} e JOIN __dirty d "
        "ON d.workspace_id = e.workspace_id AND e.occurred_at >= d.since",
    )
    fresh = attribute(suspects, workspaces, timeline).select(suspects.columns)
    changed = fresh.filter(pl.any_horizontal([fresh[c].ne_missing(suspects[c]) for c in ATTRIBUTED]))
    stale = _frame(
        connection, f"SELECT DISTINCT filename FROM {files_sql(plan.table, files)} SEMI JOIN __replaced USING (event_id)"
    )
    hit = sorted({*changed["filename"], *stale["filename"]})
    if not hit:
        return (), None
    remove = [files[path] for path in hit]
    kept = _frame(
        connection, f"SELECT * EXCLUDE (filename) FROM {files_sql(plan.table, hit)} ANTI JOIN __replaced USING (event_id)"
    )
    return remove, attribute(kept, workspaces, timeline)
