"""Copies of an event, within a batch and across batches: the first receipt counts, and a copy that says otherwise is told of.

Copies are the valid events of one `event_id` on one UTC day of `occurred_at`. The day is part of it because the table is
partitioned by it: so a batch looks only into the days its events fall in, and what it costs does not grow with the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import duckdb
import polars as pl
from pyiceberg.manifest import DataFile

from lakehouse.copies import conflict_letters, first_copies, no_conflicts
from lakehouse.ids import id_index, probe
from lakehouse.plans import Plan, frame, live_files
from lakehouse.predicates import all_of, any_of, at_least, below
from lakehouse.queries import files_sql

FIRST_BY = ("received_at", "topic", "partition", "offset")
KEY = ("event_id", "day")

CONTENT = (
    "event_name", "occurred_at", "workspace_id", "user_id", "anonymous_id", "session_id", "feature", "platform", "app_version",
    "country", "schema_version", "properties", "context", "extra",
)  # fmt: skip
"""What the copies of an event have to agree in: all that it says, not how it was delivered (sent_at, ip, user_agent)."""

CONTENT_HASH = f"(hash({', '.join(CONTENT)}) >> 1)::BIGINT"
"""A filter, never a proof that copies differ: where the hashes do, the contents are compared."""

INDEXED = {"id_hash": "hash(event_id)", "received": "epoch_us(received_at)", "content": "content_hash"}

DAY_US = 86_400_000_000

GOOD = f"""
SELECT * EXCLUDE (reason), {CONTENT_HASH} AS content_hash, hash(event_id) AS id_hash, epoch_us(occurred_at) // {DAY_US} AS day
FROM parsed WHERE reason IS NULL
"""


@dataclass(frozen=True)
class Unique:
    """What remains of a batch. events: to be inserted. replaced: (event_id, occurred_at) of rows of the table that one of them
    precedes. rejected: new dead letters, of the copies that say something else than the one that counts."""

    events: pl.DataFrame
    replaced: pl.DataFrame
    rejected: int


def unique_events(plan: Plan) -> Unique:
    """The events of `parsed` that count: once each, and not those that the table has from an earlier receipt."""
    rows = frame(plan.connection, GOOD)
    events, conflicts = first_of_batch(rows)
    told = [conflicts]
    replaced = events.select("event_id", "occurred_at").clear()
    if plan.base is not None and not events.is_empty():
        events, replaced, more = _against_table(plan, events)
        told.append(more)
    rejected = sum(plan.reject(conflict_letters(c, "received_at")) for c in told if not c.is_empty())
    return Unique(events.drop("id_hash", "day"), replaced, rejected)


def copies_once(plan: Plan) -> pl.DataFrame:
    """The events of `parsed` that count among themselves, whatever the table holds."""
    events, conflicts = first_of_batch(frame(plan.connection, GOOD))
    if not conflicts.is_empty():
        plan.reject(conflict_letters(conflicts, "received_at"))
    return events.drop("id_hash", "day")


def first_of_batch(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(the first copy of each event, those that contradict it), of rows with `id_hash` and `day`; sorted by them."""
    rows = rows.sort("day", "id_hash")
    same = (pl.col("id_hash") == pl.col("id_hash").shift()) & (pl.col("day") == pl.col("day").shift())
    repeated = rows.select(again=same.fill_null(value=False)).select(
        among=pl.col("again") | pl.col("again").shift(-1, fill_value=False)
    )["among"]
    if not repeated.any():
        return rows, no_conflicts(rows)
    first, conflicts = first_copies(rows.filter(repeated), keys=KEY, first_by=FIRST_BY, content=CONTENT)
    return pl.concat([rows.filter(~repeated), first]).sort("day", "id_hash"), conflicts


def _against_table(plan: Plan, events: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """(events to insert, rows of the table that they replace, copies in conflict); events: sorted by day and id_hash."""
    days = events.select(pl.col("day").rle().struct.unnest()).with_columns(start=pl.col("len").cum_sum() - pl.col("len"))
    spans = {day: (start, length) for length, day, start in days.iter_rows()}
    asked = events.select("id_hash", "content_hash", received=pl.col("received_at").dt.epoch("us"))
    cache = plan.lake.settings.home / "cache" / "ids"
    found: list[pl.DataFrame] = []
    unsure_files: list[DataFile] = []
    for file in _files_of(plan, sorted(spans)):
        start, length = spans[file.partition[0]]
        index = id_index(plan.connection, cache, plan.table, file, INDEXED)
        part = asked.slice(start, length)
        hit = probe(index, part["id_hash"])
        if hit.is_empty():
            continue
        new = part[hit["at"]]
        later = (new["received"] > hit["received"]) & new["content_hash"].eq_missing(hit["content"])
        found.append(pl.DataFrame({"at": hit["at"].cast(pl.Int64) + start, "later": later}))
        if not later.all():
            unsure_files.append(file)
    none = events.select("event_id", "occurred_at").clear()
    if not found:
        return events, none, no_conflicts(events)
    hits = pl.concat(found).group_by("at").agg(pl.col("later").all())
    fresh = (
        events.with_row_index("__at").join(hits, left_on=pl.col("__at").cast(pl.Int64), right_on="at", how="anti").drop("__at")
    )
    if not unsure_files:
        return fresh, none, no_conflicts(events)
    suspects = events[hits.filter(~pl.col("later"))["at"].sort()]
    insert, replaced, conflicts = _compared(plan, suspects, unsure_files)
    return pl.concat([fresh, insert], how="vertical_relaxed"), replaced, conflicts


def _files_of(plan: Plan, days: Sequence[int]) -> list[DataFile]:
    """Live files of the plan's base that lie in one of the days (since 1970)."""
    runs: list[list[int]] = []
    for day in days:
        if runs and day == runs[-1][1] + 1:
            runs[-1][1] = day
        else:
            runs.append([day, day])
    return live_files(
        plan, any_of(all_of((at_least("occurred_at", _time(a)), below("occurred_at", _time(b + 1)))) for a, b in runs)
    )


def _time(day: int) -> datetime:
    return datetime.fromtimestamp(0, UTC) + timedelta(days=day)


def _compared(plan: Plan, new: pl.DataFrame, files: Sequence[DataFile]) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Copies compared with the rows of the table themselves: (new rows that count, rows they replace, conflicts)."""
    connection: duckdb.DuckDBPyConnection = plan.connection
    connection.register("__copies", new.select(*KEY).to_arrow())
    columns = ", ".join(f'"{c}"' for c in new.columns if c not in ("id_hash", "day"))
    there = frame(
        connection,
        f"""SELECT * FROM (
            SELECT {columns}, epoch_us(occurred_at) // {DAY_US} AS day FROM {files_sql(plan.table, (f.file_path for f in files))}
        ) SEMI JOIN __copies USING (event_id, day)""",
    )
    copies = pl.concat(
        [
            there.with_columns(pl.lit(None, pl.UInt64).alias("id_hash"), pl.lit(value=False).alias("__new")).select(
                *new.columns, "__new"
            ),
            new.with_columns(pl.lit(value=True).alias("__new")),
        ],
        how="vertical_relaxed",
    )  # of equals the copy that is there counts
    winners, conflicts = first_copies(copies, keys=KEY, first_by=[*FIRST_BY, "__new"], content=CONTENT)
    insert = winners.filter("__new").drop("__new")
    replaced = there.join(insert.select(*KEY), on=list(KEY), how="semi").select("event_id", "occurred_at")
    return insert, replaced, conflicts
