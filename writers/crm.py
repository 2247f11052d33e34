"""CRM -> raw.crm_*: every version of a row that a poll sees, deletions included, from any SQL database.

A poll reads what was written since shortly before the newest `updated_at` known; once a day (crm.yaml says how often) it reads
all and compares. Which rows are new is decided by the raw table itself, committed with its position, so a poll that was killed,
repeated or run twice at once records nothing twice.

What is guaranteed. A state that stands in the CRM when a comparison reads it is recorded by that comparison at the latest,
whatever its `updated_at` says: nothing that stays is lost. A state whose `updated_at` is at most `overlap` before the moment it
was committed (by our clock) is recorded by the first poll after that. One that comes and goes between two polls is never seen:
the CRM does not show it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import polars as pl
from pyiceberg.conversions import from_bytes
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table as IcebergTable
from pyiceberg.table.update import SetPropertiesUpdate
from pyiceberg.types import PrimitiveType

from lakehouse.append import append_rows
from lakehouse.dead_letters import write_dead_letters
from lakehouse.errors import ChecksFailed, Terminal, UsageError
from lakehouse.lake import Lake
from lakehouse.live import files_where
from lakehouse.positions import NUMBERED_HERE, vector_of
from lakehouse.queries import connect, files_sql, quote
from writers.crm_source import MAPPING, MOMENT, Crm, CrmTable, load_crm, read_table
from writers.kafka import Batch

TABLES = ("raw.crm_workspaces", "raw.crm_memberships")
COMPARED_AT = "lakehouse.crm.compared-at"
"""Table property: when all of the CRM's table was last read and compared; set by the commit that holds what was found."""
FEW_ROWS = 20

log = logging.getLogger(__name__)


def changed_versions(known: pl.DataFrame, present: pl.DataFrame, seen_at: datetime, key: Sequence[str]) -> pl.DataFrame:
    """The versions in `present` that are not the last known one of their key.

    known: the last version of each key, with `received_at`; present: rows as read, one a key; both otherwise the same columns.

    A key that vanished and is back, as it was, holds again from `seen_at` on: its own times lie before the deletion.
    """
    seen = pl.lit(seen_at).cast(MOMENT)
    last = present.join(known, on=list(key), how="left", suffix="_known")

    def unchanged(*but: str) -> pl.Expr:
        columns = [c for c in present.columns if c not in (*key, *but)]
        return pl.all_horizontal([pl.col(c).eq_missing(pl.col(f"{c}_known")) for c in columns])

    # what we noticed ourselves (a row gone, a row back) carries the time of our poll, which is later than the row's
    noticed = (
        (pl.col("updated_at_known") == pl.col("received_at"))
        & (pl.col("updated_at_known") > pl.col("updated_at"))
        & ~pl.col("deleted")
    )
    back = (noticed & pl.col("deleted_known")).fill_null(value=False)
    known_back = (noticed & unchanged("effective_at", "updated_at")).fill_null(value=False)
    return (
        last.filter(~(unchanged() | known_back))
        .with_columns([pl.when(back).then(seen).otherwise(pl.col(c)).alias(c) for c in ("effective_at", "updated_at")])
        .select(present.columns)
        .sort("updated_at", *key)
    )


def vanished_versions(known: pl.DataFrame, there: pl.DataFrame, seen_at: datetime, key: Sequence[str]) -> pl.DataFrame:
    """A deletion for each known key that is not among those `there` (all keys of the CRM, readable or not)."""
    seen = pl.lit(seen_at).cast(MOMENT)
    return (
        known.filter(~pl.col("deleted"))
        .join(there, on=list(key), how="anti")
        .with_columns(seen.alias("effective_at"), seen.alias("updated_at"), pl.lit(value=True).alias("deleted"))
        .drop("received_at")
        .sort(*key)
    )


@dataclass(frozen=True)
class Recorded:
    """What the statistics of one file of the raw table say: its path, offsets [first, last], newest times."""

    path: str
    first: int
    last: int
    updated_at: datetime
    received_at: datetime


def read_since(files: Sequence[Recorded], overlap: timedelta) -> datetime | None:
    """Where an incremental read begins; None: nothing is known, so all is read.

    A row from the future does not move it past the present, or what is written now would not be read.
    """
    if not files:
        return None
    return min(max(f.updated_at for f in files), max(f.received_at for f in files)) - overlap


def files_since(files: Sequence[Recorded], since: datetime) -> list[str]:
    """The files that decide which rows with `updated_at` >= since are new.

    They hold the last version of each key of which any version was written since then: later versions have higher offsets. A
    key of which they hold none was last written before, so what is read of it is new. The cost is that of the overlap.
    """
    start = min((f.first for f in files if f.updated_at >= since), default=None)
    return [f.path for f in files if start is not None and f.last >= start]


def _statistics(table: IcebergTable, file: DataFile) -> Recorded:
    def bound(bounds: dict[int, bytes], column: str) -> int:
        field = table.schema().find_field(column)
        assert isinstance(field.field_type, PrimitiveType)
        return int(from_bytes(field.field_type, bounds[field.field_id]))

    def moment(column: str) -> datetime:
        return datetime.fromtimestamp(0, UTC) + timedelta(microseconds=bound(file.upper_bounds, column))

    first, last = bound(file.lower_bounds, "offset"), bound(file.upper_bounds, "offset")
    return Recorded(file.file_path, first, last, moment("updated_at"), moment("received_at"))


def last_versions(relation: str, spec: CrmTable) -> str:
    """SQL: the last version of each key in a relation of the raw table, with `received_at`."""
    chosen = ", ".join(quote(c) for c in (*spec.schema, "received_at"))
    key = ", ".join(quote(c) for c in spec.key)
    return f'SELECT {chosen} FROM {relation} QUALIFY row_number() OVER (PARTITION BY {key} ORDER BY "offset" DESC) = 1'


def _last_known(lake: Lake, table: IcebergTable, spec: CrmTable, files: Sequence[DataFile]) -> pl.DataFrame:
    schema = spec.schema | {"received_at": MOMENT}
    if not files:
        return pl.DataFrame(schema=schema)
    with connect(lake.settings) as connection:
        return pl.DataFrame(
            connection.execute(last_versions(files_sql(table, files), spec)).to_arrow_table(), schema_overrides=schema
        )


def ingest_crm(
    lake: Lake, url: str, seen_at: datetime | None = None, names: Sequence[str] = TABLES, *, compare: bool = False
) -> list[Batch]:
    """Poll the CRM's tables once each and commit the versions not seen before; one without an entry in crm.yaml is left out.

    compare: read all and look for deletions, whether it is time for that or not.

    Raises:
        Fenced: another poll committed meanwhile. Terminal, Retryable: see `read_table`. ChecksFailed: a comparison misses so many
            rows that no deletion was recorded; what is there was.
    """
    seen_at = seen_at or datetime.now(UTC)
    crm = load_crm(lake.settings.catalog_dir)
    if unknown := sorted(crm.tables.keys() - set(TABLES)):
        raise UsageError(f"{MAPPING}: no writer fills {unknown[0]!r}; tables: {', '.join(TABLES)}")
    return [_poll(lake, url, seen_at, name, crm, compare=compare) for name in names if name in crm.tables]


def _poll(lake: Lake, url: str, seen_at: datetime, name: str, crm: Crm, *, compare: bool) -> Batch:
    spec, topic = crm.tables[name], name.removeprefix("raw.").replace("_", ".", 1)
    table = lake.open_for_write(name)
    position = vector_of(table.metadata, name).get((topic, 0), 0)
    compared = table.properties.get(COMPARED_AT)
    live = {file.file_path: file for file in files_where(table)}
    recorded = [_statistics(table, file) for file in live.values()]
    since = read_since(recorded, crm.overlap)
    if compare or compared is None or seen_at - datetime.fromisoformat(compared) >= crm.compare_every:
        since = None
    complete = since is None
    read = read_table(url, spec, since, naive_is_utc=crm.times_without_zone_are_utc)
    if complete and read.rows.is_empty() and read.unusable.height:
        raise Terminal(
            f"no row of the CRM's {spec.table} can be used ({read.unusable['reason'][0]}); its columns are in {MAPPING}"
        )
    _keep_unusable(lake, name, topic, spec, read.unusable, seen_at)
    needed = live if since is None else files_since(recorded, since)
    known = _last_known(lake, table, spec, [live[path] for path in needed])
    new = changed_versions(known, read.rows, seen_at, spec.key)
    held = 0
    if complete:
        there = pl.concat([read.rows.select(spec.key), read.unusable.select(spec.key)])
        gone = vanished_versions(known, there, seen_at, spec.key)
        if gone.height > max(FEW_ROWS, crm.largest_share_gone * known.filter(~pl.col("deleted")).height):
            held = gone.height  # what is there is recorded all the same
        else:
            new = pl.concat([new, gone])
    rows = new.select(
        pl.lit(topic).alias("topic"),
        pl.lit(0, pl.Int32).alias("partition"),
        pl.int_range(position, position + new.height, dtype=pl.Int64).alias("offset"),
        pl.lit(seen_at).alias("received_at"),
        *spec.schema,
    )
    reached = {(topic, 0): position + new.height}
    remembered = [SetPropertiesUpdate(updates={COMPARED_AT: seen_at.isoformat()})] if complete and not held else []
    done = append_rows(lake, name, rows.to_arrow(), {(topic, 0): position}, reached, {topic: NUMBERED_HERE}, remembered)
    if held:
        raise ChecksFailed(
            f"{name}: {held:,} of {known.height:,} rows known are gone from the CRM's {spec.table}; no deletion was recorded. "
            f"Is it being reloaded? If they are gone for good, raise largest_share_gone in {MAPPING} for one poll"
        )
    return Batch(name, done.snapshot_id, new.height, 0)


def _keep_unusable(lake: Lake, name: str, topic: str, spec: CrmTable, unusable: pl.DataFrame, seen_at: datetime) -> None:
    """Dead letters of rows that say no time or no key. They have no offset: a number made of key and reason stands for it."""
    if unusable.is_empty():
        return
    counts = ", ".join(f"{n} {reason}" for reason, n in sorted(unusable["reason"].value_counts().iter_rows()))
    log.warning("%s: rows of the CRM's %s that cannot be used: %s", name, spec.table, counts)
    numbers = [int.from_bytes(hashlib.blake2b(repr(row).encode(), digest_size=8).digest()) >> 1 for row in unusable.iter_rows()]
    rejected = unusable.select(
        pl.lit(topic).alias("topic"),
        pl.lit(0, pl.Int32).alias("partition"),
        pl.Series("offset", numbers, pl.Int64),
        pl.lit(seen_at).cast(MOMENT).alias("received_at"),
        "reason",
        pl.lit(f"a row of the CRM's {spec.table}; mended there, it is read again").alias("detail"),
    )
    write_dead_letters(lake, name, rejected.to_arrow())
