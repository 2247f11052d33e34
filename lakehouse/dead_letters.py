"""Dead letters: a record that a transform cannot use is kept by its coordinates and reason, and holds nobody up.

They commit before the data they were left out of, and again is harmless: the key is (consumer, coordinates). A letter is
open until a replay finds that its transform can use the record now (lakehouse/replay.py); it is never removed.
"""

from __future__ import annotations

from datetime import datetime

import polars as pl
import pyarrow as pa
from pyiceberg.expressions import BooleanExpression, Not

from lakehouse import metrics
from lakehouse.commit import Change, commit, scope_of
from lakehouse.errors import Replan
from lakehouse.lake import Lake
from lakehouse.live import files_where
from lakehouse.predicates import all_of, at_least, at_most, below, equal, is_null
from lakehouse.queries import connect, fetch, files_sql
from lakehouse.staging import stage

TABLE = "ops.dead_letters"
MAX_PLANS = 20
KEY = ["consumer", "topic", "partition", "offset"]


def write_dead_letters(lake: Lake, consumer: str, rejected: pa.Table) -> int:
    """Keep `rejected` (columns topic, partition, offset, received_at, reason, detail); returns how many are new."""
    if rejected.num_rows == 0:
        return 0
    rows = pl.DataFrame(rejected).with_columns(pl.lit(consumer).alias("consumer")).unique(KEY, keep="first", maintain_order=True)
    offsets = rows["offset"].to_list()
    known_range = all_of((equal("consumer", consumer), at_least("offset", min(offsets)), below("offset", max(offsets) + 1)))
    for _ in range(MAX_PLANS):
        table = lake.open_for_write(TABLE)
        base = table.current_snapshot()
        known = pl.DataFrame(table.scan(known_range, selected_fields=tuple(KEY)).to_arrow())
        new = rows.join(known, on=KEY, how="anti")
        if new.is_empty():
            return 0
        files = stage(table, lake.declaration(TABLE), new.to_arrow())
        change = Change(TABLE, {}, {}, add=files, rewrite=True, base=base.snapshot_id if base else None, scope=scope_of(files))
        try:
            commit(table, lake.run, change)
        except Replan:  # another job wrote dead letters of the same days: look again at what is known
            continue
        metrics.DEAD_LETTERS.labels(consumer).inc(new.height)
        return new.height
    raise Replan(f"{TABLE}: other jobs wrote dead letters of the same days {MAX_PLANS} times; run it again")


def open_letters(
    lake: Lake, consumer: str, reason: str | None = None, since: datetime | None = None, until: datetime | None = None
) -> pl.DataFrame:
    """The letters of one consumer that no replay has resolved, received in [since, until); columns KEY, received_at, reason."""
    columns = [*KEY, "received_at", "reason"]
    if not lake.exists(TABLE):
        return pl.DataFrame(schema=columns)
    wanted = [equal("consumer", consumer)]
    wanted += [equal("reason", reason)] if reason is not None else []
    wanted += [at_least("received_at", since)] if since is not None else []
    wanted += [below("received_at", until)] if until is not None else []
    # the columns of a replay are added to an older table when it is opened for writing
    found = lake.open_for_write(TABLE).scan(all_of(wanted), selected_fields=(*columns, "resolved_at")).to_arrow()
    return pl.DataFrame(found).filter(pl.col("resolved_at").is_null()).select(columns)


def take_up(lake: Lake, consumer: str, replayed: pl.DataFrame, at: datetime) -> None:
    """Write down, before any row lands, that a replay takes up these letters (KEY without consumer) at `at`.

    A replay that died and is run again keeps the first time: its rows may have landed under it.
    """
    _rewrite(lake, consumer, replayed.select(KEY[1:]), TAKEN_UP, at)


def understood(lake: Lake, consumer: str) -> pa.Table:
    """When a replay took up each letter that it resolved, or has not ended: topic, partition, offset, understood_at."""
    names = [*KEY[1:], "taken_up_at", "resolved_at"]
    wanted = all_of((equal("consumer", consumer), Not(is_null("taken_up_at"))))
    if not lake.exists(TABLE):
        none = [("topic", pa.string()), ("partition", pa.int32()), ("offset", pa.int64())]
        return pa.schema([*none, ("understood_at", pa.timestamp("us", "UTC"))]).empty_table()
    found = lake.open_for_write(TABLE).scan(wanted, selected_fields=tuple(names)).to_arrow()
    return found.select(names[:4]).rename_columns([*KEY[1:], "understood_at"])


def replaying_since(lake: Lake) -> datetime | None:
    """When the first replay began that has not ended; None if none is under way."""
    if not lake.exists(TABLE):
        return None
    wanted = all_of((Not(is_null("taken_up_at")), is_null("resolved_at")))
    found = lake.open_for_write(TABLE).scan(wanted, selected_fields=("taken_up_at", "resolved_at")).to_arrow()
    return min(found.column("taken_up_at").to_pylist(), default=None)


def settle(lake: Lake, consumer: str, replayed: pl.DataFrame, refused: pl.DataFrame, at: datetime) -> None:
    """Write down what a replay found: letters of `replayed` (KEY without consumer) are resolved, those in `refused` stay open.

    refused: with the reason and detail of today. One rewrite at base of the files that hold these letters; again changes nothing
    that matters.
    """
    coordinates = KEY[1:]
    found = replayed.select(coordinates).join(refused.select(*coordinates, "reason", "detail"), on=coordinates, how="left")
    _rewrite(lake, consumer, found, SETTLED, at)


def _rewrite(lake: Lake, consumer: str, found: pl.DataFrame, sql: str, at: datetime) -> None:
    offsets = found["offset"].to_list()
    held = all_of((equal("consumer", consumer), at_least("offset", min(offsets)), at_most("offset", max(offsets))))
    for _ in range(MAX_PLANS):
        try:
            _rewrite_once(lake, consumer, found, held, sql, at)
        except Replan:  # another job wrote dead letters of the same days
            continue
        return
    raise Replan(f"{TABLE}: other jobs wrote dead letters of the same days {MAX_PLANS} times; run it again")


# Letters of the replay get today's answer, all others of the same files stay as they are.
SETTLED = """
SELECT
    l.* EXCLUDE (filename) REPLACE (
        coalesce(f.reason, l.reason) AS reason,
        CASE WHEN f.reason IS NULL THEN l.detail ELSE f.detail END AS detail,
        CASE WHEN f.reason IS NULL THEN l.taken_up_at END AS taken_up_at,
        CASE WHEN f.topic IS NULL THEN l.replayed_at ELSE $at END AS replayed_at,
        CASE WHEN f.topic IS NOT NULL AND f.reason IS NULL THEN coalesce(l.resolved_at, $at) ELSE l.resolved_at END AS resolved_at
    )
FROM {letters} AS l
LEFT JOIN __found AS f
    ON l.consumer = $consumer AND f.topic = l.topic AND f.partition = l.partition AND f."offset" = l."offset"
"""


TAKEN_UP = """
SELECT
    l.* EXCLUDE (filename) REPLACE (
        CASE WHEN f.topic IS NULL THEN l.taken_up_at ELSE coalesce(l.taken_up_at, $at) END AS taken_up_at
    )
FROM {letters} AS l
LEFT JOIN __found AS f
    ON l.consumer = $consumer AND f.topic = l.topic AND f.partition = l.partition AND f."offset" = l."offset"
"""


def _rewrite_once(lake: Lake, consumer: str, found: pl.DataFrame, held: BooleanExpression, sql: str, at: datetime) -> None:
    table = lake.open_for_write(TABLE)
    base = table.current_snapshot()
    files = files_where(table, held)
    if base is None or not files:
        return
    with connect(lake.settings) as connection:
        connection.register("__found", found.to_arrow())
        letters = files_sql(table, files)
        rows = fetch(connection, sql.format(letters=letters), {"at": at, "consumer": consumer})
    add = stage(table, lake.declaration(TABLE), rows)
    commit(
        table,
        lake.run,
        Change(TABLE, {}, {}, add=add, remove=files, rewrite=True, base=base.snapshot_id, scope=scope_of([*add, *files])),
    )
