"""Dead letters: a record that a transform cannot use is kept by its coordinates and reason, and holds nobody up.

They commit before the data they were left out of, and again is harmless: the key is (consumer, coordinates).
"""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from lakehouse.commit import Change, commit, scope_of
from lakehouse.errors import Replan
from lakehouse.lake import Lake
from lakehouse.predicates import all_of, at_least, below, equal
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
        return new.height
    raise Replan(f"{TABLE}: other jobs wrote dead letters of the same days {MAX_PLANS} times; run it again")
