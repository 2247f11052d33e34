"""A table as it was first written: each row as the snapshot had it that took up its record, before anything repaired it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from lakehouse.lake import Lake, history, snapshot_vector
from lakehouse.queries import bind_table, connect, fetch, quote


def first_written(lake: Lake, name: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of a table whose rows carry the coordinates of their records, a snapshot at a time, the oldest first.

    A snapshot gives the rows of the records that it took up. A row that a copy of its record replaced later comes twice.
    Snapshots that have expired are not there to be asked: their rows come as the next one had them.
    """
    table, reached = lake.load(name), dict[tuple[str, int], int]()
    for snapshot in reversed(history(table)):
        vector = snapshot_vector(snapshot, name)
        if not vector or vector == reached:  # maintenance, or a window made again
            continue
        before = [{"topic": t, "partition": p, "reached": o} for (t, p), o in reached.items()]
        schema = pa.schema({"topic": pa.string(), "partition": pa.int32(), "reached": pa.int64()})
        with connect(lake.settings) as connection:
            bind_table(connection, name, table, snapshot.snapshot_id)
            connection.register("__before", pa.Table.from_pylist(before, schema=schema))
            listed = ", ".join(f'"{c}"' for c in columns)
            yield fetch(
                connection,
                f"""
                SELECT {listed} FROM {quote(name)} LEFT JOIN __before USING (topic, partition)
                WHERE "offset" >= coalesce(reached, 0)
                """,
            )
        reached = vector
