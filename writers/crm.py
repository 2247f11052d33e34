"""CRM -> raw.crm_workspaces: every version of a mapping that a poll sees, deletions included, from any SQL database."""

from __future__ import annotations

from datetime import UTC, datetime

import polars as pl
from pyiceberg.table import Table as IcebergTable
from sqlalchemy import column, create_engine, inspect, select
from sqlalchemy import table as sql_table
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from lakehouse.append import append_rows
from lakehouse.errors import Retryable, Terminal
from lakehouse.lake import Lake
from lakehouse.positions import NUMBERED_HERE, vector_of
from lakehouse.queries import connect, files_sql
from writers.kafka import Batch

TABLE = "raw.crm_workspaces"
TOPIC = "crm.workspaces"

VERSION = ["customer_id", "effective_at", "updated_at", "deleted"]
SCHEMA: dict[str, pl.DataType] = {
    "workspace_id": pl.String(),
    "customer_id": pl.String(),
    "effective_at": pl.Datetime("us", "UTC"),
    "updated_at": pl.Datetime("us", "UTC"),
    "deleted": pl.Boolean(),
}


WORKSPACES = sql_table(
    "workspaces", *(column(c) for c in ("workspace_id", "stripe_customer_id", "effective_at", "updated_at", "deleted"))
)


def read_crm(url: str) -> pl.DataFrame:
    """The CRM's table `workspaces` as it stands: columns of SCHEMA, one row a workspace.

    Raises:
        Terminal: no such table, or a time that is not ISO-8601 with a zone. Retryable: the database does not answer.
    """
    try:
        engine = create_engine(url)
    except (ArgumentError, ImportError) as error:
        raise Terminal(f"LAKEHOUSE_CRM_URL cannot be used: {error}") from None
    try:
        with engine.connect() as connection:
            looked = inspect(connection)
            if not looked.has_table(WORKSPACES.name):
                raise Terminal(f"the CRM at {engine.url.render_as_string()} has no table 'workspaces'; check LAKEHOUSE_CRM_URL")
            if missing := {c.name for c in WORKSPACES.c} - {c["name"] for c in looked.get_columns(WORKSPACES.name)}:
                raise Terminal(f"the CRM's table 'workspaces' has no column {min(missing)!r}")
            rows = connection.execute(select(WORKSPACES)).all()
    except SQLAlchemyError as error:
        raise Retryable(f"the CRM at {engine.url.render_as_string()} does not answer: {type(error).__name__}") from None
    finally:
        engine.dispose()
    return pl.DataFrame(
        [(w, c, _instant(e, "effective_at"), _instant(u, "updated_at"), bool(d)) for w, c, e, u, d in rows], SCHEMA, orient="row"
    )


def _instant(value: str | datetime, column: str) -> datetime:
    try:
        at = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except ValueError:
        raise Terminal(f"the CRM's workspaces.{column} holds something that is no ISO-8601 time") from None
    if at.tzinfo is None:
        raise Terminal(f"the CRM's workspaces.{column} holds a time without a zone")
    return at.astimezone(UTC)


def changed_versions(known: pl.DataFrame, present: pl.DataFrame, seen_at: datetime) -> pl.DataFrame:
    """The versions in `present` that are not the last known one of their workspace, and a deletion for each that vanished.

    A workspace that vanished and is back, as it was, holds again from `seen_at` on: its own times lie before the deletion.
    A pure function; both frames have the columns of SCHEMA, `known` one row a workspace.
    """
    seen = pl.lit(seen_at).cast(SCHEMA["updated_at"])
    last = present.join(known, on="workspace_id", how="left", suffix="_known")
    same = [pl.col(c).eq_missing(pl.col(f"{c}_known")) for c in VERSION]
    # what we noticed ourselves (a row gone, a row back) carries our own time, which is later than the row's
    noticed = (pl.col("updated_at_known") > pl.col("updated_at")) & (pl.col("updated_at_known") == pl.col("effective_at_known"))
    back = (noticed & pl.col("deleted_known") & ~pl.col("deleted")).fill_null(value=False)
    same_customer = pl.col("customer_id").eq_missing(pl.col("customer_id_known"))
    known_back = (noticed & same_customer & ~pl.col("deleted_known") & ~pl.col("deleted")).fill_null(value=False)
    new = (
        last.filter(~(pl.all_horizontal(same) | known_back))
        .with_columns([pl.when(back).then(seen).otherwise(pl.col(c)).alias(c) for c in ("effective_at", "updated_at")])
        .select(present.columns)
    )
    gone = (
        known.filter(~pl.col("deleted"))
        .join(present, on="workspace_id", how="anti")
        .with_columns(
            seen.alias("effective_at"),
            seen.alias("updated_at"),
            pl.lit(value=True).alias("deleted"),
        )
    )
    return pl.concat([new, gone.select(new.columns)]).sort("updated_at", "workspace_id")


def _last_known(lake: Lake, table: IcebergTable) -> pl.DataFrame:
    """The last version of each workspace that the raw table holds: columns of SCHEMA."""
    files = [task.file.file_path for task in table.scan().plan_files()]
    if not files:
        return pl.DataFrame(schema=SCHEMA)
    with connect(lake.settings) as connection:
        last = connection.execute(
            f"SELECT {', '.join(SCHEMA)} FROM {files_sql(table, files)} "
            'QUALIFY row_number() OVER (PARTITION BY workspace_id ORDER BY "offset" DESC) = 1'
        ).to_arrow_table()
    return pl.DataFrame(last, schema_overrides=SCHEMA)


def ingest_crm(lake: Lake, url: str, seen_at: datetime | None = None) -> Batch:
    """Poll the CRM once and commit the versions not seen before.

    Raises:
        Fenced: another poll committed meanwhile.
    """
    seen_at = seen_at or datetime.now(UTC)
    present = read_crm(url)
    table = lake.open_for_write(TABLE)
    position = vector_of(table.metadata, TABLE).get((TOPIC, 0), 0)
    known = _last_known(lake, table)
    new = changed_versions(known, present, seen_at)
    rows = new.select(
        pl.lit(TOPIC).alias("topic"),
        pl.lit(0, pl.Int32).alias("partition"),
        pl.int_range(position, position + new.height, dtype=pl.Int64).alias("offset"),
        pl.lit(seen_at).alias("received_at"),
        *SCHEMA,
    )
    done = append_rows(
        lake, TABLE, rows.to_arrow(), {(TOPIC, 0): position}, {(TOPIC, 0): position + new.height}, {TOPIC: NUMBERED_HERE}
    )
    return Batch(TABLE, done.snapshot_id, new.height, 0)
