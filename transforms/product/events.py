"""product.events: clean, deduplicated events, each with the plan and billing status in force when it happened.

One pass a micro-batch: parse, refuse the bad rows one by one, deduplicate, attribute, write. The same commit repairs the
events that late billing or a late CRM row made wrong: only those in dirty ranges are looked at, only files that really
change are written again.
"""

from __future__ import annotations

import polars as pl

from lakehouse.commit import scope_of
from lakehouse.plans import Plan, Staged, count_rows
from lakehouse.queries import bind_sql
from lakehouse.staging import stage
from transforms.product import attribution
from transforms.product.attribution import attribute, known_for, rewrites
from transforms.product.duplicates import unique_events
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
    # read once, then parsed in parallel: with a schema by field id DuckDB reads a file in one thread, whatever its row groups
    new = plan.new_rows_sql("raw.product_events")
    connection.execute(f'CREATE TEMP TABLE records AS SELECT topic, partition, "offset", received_at, payload FROM {new}')
    bind_sql(connection, "raw.product_events", "records")
    plan.bind(attribution.INPUTS)
    parse(connection, plan.declared, ALLOWED)
    connection.execute("DROP TABLE records")
    rejected = connection.execute(
        'SELECT topic, partition, "offset", received_at, reason, NULL::VARCHAR AS detail FROM parsed WHERE reason IS NOT NULL'
    ).to_arrow_table()
    dead = plan.reject(rejected)

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
