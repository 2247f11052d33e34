"""product.events: clean, deduplicated events, each with the plan and billing status in force when it happened.

One pass a micro-batch: parse, refuse the bad rows one by one, deduplicate, attribute, write. The same commit repairs the
events that late billing or a late CRM row made wrong: only those in dirty ranges are looked at, only files that really
change are written again.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import polars as pl
import pyarrow as pa

from lakehouse.commit import scope_of
from lakehouse.coordinates import COORDINATES
from lakehouse.plans import Plan, Staged
from lakehouse.queries import bind_sql
from lakehouse.staging import stage
from transforms.product import attribution
from transforms.product.attribution import attribute, known_now, rewrites
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
ALLOWED = Lateness(late=timedelta(hours=72), too_late=timedelta(days=30), too_early=timedelta(minutes=10))


def plan(plan: Plan) -> Staged:
    """Stage one micro-batch: new events, and the files that repair or an earlier copy of an event changes."""
    parsed, dead = _parsed(plan, plan.new_rows_sql("raw.product_events"))
    good = _good(parsed)
    unique = unique_events(plan, good)
    known = known_now(plan, unique.events)
    events = attribute(unique.events, known)
    remove, rewritten = rewrites(plan, known, unique.replaced)
    columns = plan.declared.column_names
    added = pl.concat(
        [events.select(columns), *([rewritten.select(columns)] if rewritten is not None else [])], how="vertical_relaxed"
    )
    files = stage(plan.table, plan.declared, added)
    return Staged(
        files,
        remove,
        scope_of(files),
        new_input_rows=parsed.height,
        rows=added.height,
        rejected=dead + unique.rejected,
    )


WINDOW = "occurred_at"


def derive(plan: Plan, start: datetime, end: datetime) -> pa.Table:
    """The rows of [start, end), whole UTC days, made from all raw records that can hold an event of these days."""
    received = (start - ALLOWED.too_early, end + ALLOWED.too_late)
    parsed, _ = _parsed(plan, plan.consumed_sql("raw.product_events", "received_at", *received))
    within = (pl.col("occurred_at") >= start) & (pl.col("occurred_at") < end)
    events = copies_once(plan, _good(parsed).filter(within))
    known = known_now(plan, events)
    return attribute(events, known).select(plan.declared.column_names).to_arrow()


def _parsed(plan: Plan, records: str) -> tuple[pl.DataFrame, int]:
    """(raw records (SQL) as `parse` reads them, how many new dead letters those make that cannot be used)."""
    connection = plan.connection
    # read once, then parsed in parallel: with a schema by field id DuckDB reads a file in one thread, whatever its row groups
    connection.execute(f'CREATE TEMP TABLE records AS SELECT topic, partition, "offset", received_at, payload FROM {records}')
    bind_sql(connection, "raw.product_events", "records")
    plan.bind(attribution.INPUTS)
    parsed = parse(connection, plan.declared, ALLOWED)
    connection.execute("DROP TABLE records")
    refused = parsed.filter(pl.col("reason").is_not_null())
    told = refused.select(*COORDINATES, "received_at", "reason", detail=pl.lit(None, pl.String))
    return parsed, plan.reject(told.to_arrow())


def _good(parsed: pl.DataFrame) -> pl.DataFrame:
    return parsed.filter(pl.col("reason").is_null()).drop("reason")
