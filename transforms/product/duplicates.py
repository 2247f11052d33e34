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
from lakehouse.ids import probe_files
from lakehouse.plans import Plan, frame, live_files
from lakehouse.predicates import all_of, any_of, at_least, below
from lakehouse.queries import files_sql
from transforms.product.parsing import CONTENT

FIRST_BY = ("received_at", "topic", "partition", "offset")
KEY = ("event_id", "day")

INDEXED = {"id_hash": "hash(event_id)", "received": "epoch_us(received_at)", "content": "content_hash"}

DAY_US = 86_400_000_000

DAY = (pl.col("occurred_at").dt.epoch("us") // DAY_US).alias("day")


@dataclass(frozen=True)
class Unique:
    """What remains of a batch. events: to be inserted. replaced: (event_id, occurred_at) of rows of the table that one of them
    precedes. rejected: new dead letters, of the copies that say something else than the one that counts."""

    events: pl.DataFrame
    replaced: pl.DataFrame
    rejected: int


def unique_events(plan: Plan, rows: pl.DataFrame) -> Unique:
    """The events that count, of the good rows of transforms/product/parsing.py: once each, and not those that the table has from
    an earlier receipt."""
    named = _named(rows)
    again, conflicts = _later_copies(rows, named)
    told = [conflicts]
    replaced = rows.select("event_id", "occurred_at").clear()
    if plan.base is not None and len(again) < rows.height:
        known, replaced, more = _known(plan, rows, _without(named, again))
        again = pl.concat([again, known])
        told.append(more)
    rejected = sum(plan.reject(conflict_letters(c, "received_at")) for c in told if not c.is_empty())
    return Unique(_left(rows, again), replaced, rejected)


def copies_once(plan: Plan, rows: pl.DataFrame) -> pl.DataFrame:
    """The events that count among themselves, whatever the table holds."""
    events, conflicts = first_of_batch(rows)
    if not conflicts.is_empty():
        plan.reject(conflict_letters(conflicts, "received_at"))
    return events


def first_of_batch(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(the first copy of each event, those that contradict it), of good rows, in the order they have."""
    again, conflicts = _later_copies(rows, _named(rows))
    return _left(rows, again), conflicts


def _named(rows: pl.DataFrame) -> pl.DataFrame:
    """What tells events apart, and where in `rows` each is (`at`), sorted by day and id_hash: little to sort, and to look up."""
    narrow = rows.select(DAY, "id_hash", "content_hash", received=pl.col("received_at").dt.epoch("us"))
    return narrow.with_row_index("at").sort("day", "id_hash")


def _without(named: pl.DataFrame, at: pl.Series) -> pl.DataFrame:
    return named.filter(~pl.col("at").is_in(at.implode()))


def _left(rows: pl.DataFrame, gone: pl.Series) -> pl.DataFrame:
    """The rows that are not at one of these places, without what only names them."""
    kept = pl.repeat(True, rows.height, dtype=pl.Boolean, eager=True).scatter(gone, values=False) if len(gone) else None
    return (rows if kept is None else rows.filter(kept)).drop("id_hash")


def _later_copies(rows: pl.DataFrame, named: pl.DataFrame) -> tuple[pl.Series, pl.DataFrame]:
    """(where in `rows` a copy is that does not count, for an earlier one of its event is among them; what contradicts that)."""
    same = (pl.col("id_hash") == pl.col("id_hash").shift()) & (pl.col("day") == pl.col("day").shift())
    repeated = named.with_columns(again=same.fill_null(value=False)).filter(
        pl.col("again") | pl.col("again").shift(-1, fill_value=False)
    )
    if repeated.is_empty():
        return repeated["at"], no_conflicts(rows)
    copies = rows.select("event_id", DAY, *FIRST_BY, "content_hash")[repeated["at"]].with_columns(repeated["at"])
    winners, differing = first_copies(copies, keys=KEY, first_by=FIRST_BY, content=["content_hash"])
    again = copies.join(winners, on="at", how="anti")["at"]
    if differing.is_empty():
        return again, no_conflicts(rows)
    suspects = rows[copies.join(differing, on=list(KEY), how="semi")["at"].sort()].with_columns(DAY)
    return again, first_copies(suspects, keys=KEY, first_by=FIRST_BY, content=CONTENT)[1]


def _known(plan: Plan, rows: pl.DataFrame, named: pl.DataFrame) -> tuple[pl.Series, pl.DataFrame, pl.DataFrame]:
    """(where in `rows` a copy is of which the table has an earlier one, rows of the table that make way, copies in conflict)."""
    days = named.select(pl.col("day").rle().struct.unnest()).with_columns(start=pl.col("len").cum_sum() - pl.col("len"))
    spans = {day: (start, length) for length, day, start in days.iter_rows()}
    parts = [(file, named.slice(*spans[file.partition[0]])) for file in _files_of(plan, sorted(spans))]
    asked = [(file, part["id_hash"]) for file, part in parts]
    found, unsure_files = [named.select("at", later=pl.lit(value=True)).clear()], []
    for (file, part), hit in zip(parts, probe_files(plan.connection, plan.id_indexes, plan.table, asked, INDEXED), strict=True):
        new = part[hit["at"]]
        later = (new["received"] > hit["received"]) & new["content_hash"].eq_missing(hit["content"])
        found.append(pl.DataFrame({"at": new["at"], "later": later}))
        if not later.all():
            unsure_files.append(file)
    hits = pl.concat(found).group_by("at").agg(pl.col("later").all())
    if not unsure_files:
        return hits["at"], rows.select("event_id", "occurred_at").clear(), no_conflicts(rows)
    suspects = hits.filter(~pl.col("later"))["at"].sort()
    insert, replaced, conflicts = _compared(plan, rows[suspects].with_columns(DAY, suspects.alias("at")), unsure_files)
    return _without(hits, insert)["at"], replaced, conflicts


def _files_of(plan: Plan, days: Sequence[int]) -> Sequence[DataFile]:
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


def _compared(plan: Plan, new: pl.DataFrame, files: Sequence[DataFile]) -> tuple[pl.Series, pl.DataFrame, pl.DataFrame]:
    """Copies compared with the rows of the table themselves: (`at` of the new rows that count, rows they replace, conflicts)."""
    connection: duckdb.DuckDBPyConnection = plan.connection
    connection.register("__copies", new.select(*KEY).to_arrow())
    columns = ", ".join(f'"{c}"' for c in new.columns if c not in ("id_hash", "day", "at"))
    there = frame(
        connection,
        f"""SELECT * FROM (
            SELECT {columns}, epoch_us(occurred_at) // {DAY_US} AS day FROM {files_sql(plan.table, files)}
        ) SEMI JOIN __copies USING (event_id, day)""",
    )
    # of equals the copy that is there counts
    both = [there.with_columns(pl.lit(value=False).alias("__new")), new.with_columns(pl.lit(value=True).alias("__new"))]
    copies = pl.concat(both, how="diagonal_relaxed")
    winners, conflicts = first_copies(copies, keys=KEY, first_by=[*FIRST_BY, "__new"], content=CONTENT)
    insert = winners.filter("__new")
    replaced = there.join(insert.select(*KEY), on=list(KEY), how="semi").select("event_id", "occurred_at")
    return insert["at"], replaced, conflicts
