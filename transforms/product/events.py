"""product.events: clean, deduplicated events, each with the plan and billing status in force when it happened.

One pass a micro-batch: parse, refuse the bad rows one by one, deduplicate, attribute, write. The same commit repairs the
events that late billing or a late CRM row made wrong: only those in dirty ranges are looked at, only files that really
change are written again.
"""

from __future__ import annotations

from datetime import UTC, datetime

import polars as pl
import pyarrow as pa

from lakehouse.commit import scope_of
from lakehouse.plans import Plan, Staged, count_rows
from lakehouse.queries import bind_sql
from lakehouse.staging import stage
from transforms.product import attribution
from transforms.product.attribution import attribute, known_for, rewrites
from transforms.product.duplicates import copies_once, unique_events
from transforms.product.parsing import Lateness, parse

INPUTS = (
    "raw.product_events",
    "raw.crm_workspaces",
    "raw.crm_memberships",
    "billing.event_versions",
    *attribution.INPUTS,
)


# Normal up to 72 h late, accepted and flagged up to 30 days, else (or more than 10 min ahead) refused.
ALLOWED = Lateness(late="INTERVAL 72 HOUR", too_late="INTERVAL 30 DAY", too_early="INTERVAL 10 MINUTE")


def plan(plan: Plan) -> Staged:
    """Stage one micro-batch: new events, and the files that repair or an earlier copy of an event changes."""
    connection = plan.connection
    dead = _parsed(plan, plan.new_rows_sql("raw.product_events"))
    unique = unique_events(plan)
    known = known_for(connection, unique.events, plan.lake.settings.catalog_dir)
    events = attribute(unique.events, known)
    remove, rewritten = rewrites(plan, known, unique.replaced)
    columns = plan.declared.column_names
    added = pl.concat(
        [events.select(columns), *([rewritten.select(columns)] if rewritten is not None else [])], how="vertical_relaxed"
    )
    files = stage(plan.table, plan.declared, added.to_arrow())
    return Staged(
        files,
        remove,
        scope_of(files),
        new_input_rows=count_rows(connection, "parsed"),
        rows=added.height,
        rejected=dead + unique.rejected,
    )


WINDOW = "occurred_at"


def derive(plan: Plan, start: datetime, end: datetime) -> pa.Table:
    """The rows of [start, end), whole UTC days, made from all raw records that can hold an event of these days."""
    connection = plan.connection
    received = f"SELECT $start - {ALLOWED.too_early}, $end + {ALLOWED.too_late}"
    since, until = (t.astimezone(UTC) for t in connection.execute(received, {"start": start, "end": end}).fetchall()[0])
    _parsed(plan, plan.consumed_sql("raw.product_events", "received_at", since, until))
    outside = {"start": start, "end": end}
    connection.execute("DELETE FROM parsed WHERE reason IS NOT NULL OR occurred_at < $start OR occurred_at >= $end", outside)
    events = copies_once(plan)
    known = known_for(connection, events, plan.lake.settings.catalog_dir)
    return attribute(events, known).select(plan.declared.column_names).to_arrow()


def _parsed(plan: Plan, records: str) -> int:
    """Make the relation `parsed` of raw records (SQL); those that cannot be used become dead letters; how many are new."""
    connection = plan.connection
    # read once, then parsed in parallel: with a schema by field id DuckDB reads a file in one thread, whatever its row groups
    connection.execute(f'CREATE TEMP TABLE records AS SELECT topic, partition, "offset", received_at, payload FROM {records}')
    bind_sql(connection, "raw.product_events", "records")
    plan.bind(attribution.INPUTS)
    parse(connection, plan.declared, ALLOWED)
    connection.execute("DROP TABLE records")
    rejected = connection.execute(
        'SELECT topic, partition, "offset", received_at, reason, NULL::VARCHAR AS detail FROM parsed WHERE reason IS NOT NULL'
    ).to_arrow_table()
    return plan.reject(rejected)
