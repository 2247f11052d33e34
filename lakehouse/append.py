"""An append at position: rows are checked and written to Parquet while they come, and committed with the positions reached.

Memory does not grow with the batch: rows wait until they fill a row group, which a thread of its own then encodes. Three
row groups at most are in memory: one that fills, one that is encoded, and one whose rows are on their way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.table.update import TableUpdate

from lakehouse import failpoints
from lakehouse.checks import check_rows, check_staged
from lakehouse.commit import Change, Committed, commit
from lakehouse.coordinates import COORDINATES
from lakehouse.errors import Retryable
from lakehouse.lake import Lake
from lakehouse.positions import TopicPartition, Vector
from lakehouse.queries import connect
from lakehouse.staging import ROW_GROUP_BYTES, OpenFiles, conform, refuse_nulls


class Append:
    """One batch of a raw table, from the first row to the commit. `commit` or `abandon` ends it; nothing is published before.

    positions: where the table stood when the writer began; what is absent stands at 0. sources: the origin of each topic (see
    `Position.source`). updates: see `Change`.
    """

    def __init__(
        self,
        lake: Lake,
        name: str,
        positions: Vector,
        sources: Mapping[str, str] | None = None,
        updates: Sequence[TableUpdate] = (),
    ) -> None:
        self._lake, self._name, self._positions, self._sources, self._updates = lake, name, positions, sources or {}, updates
        self._declared, self._table = lake.declaration(name), lake.open_for_write(name)
        # `_advance` sees to it that coordinates ascend, so they are unique over all row groups; another key is checked at the end
        self._keyed = sorted(self._declared.primary_key) == sorted(COORDINATES)
        self._files = OpenFiles(self._table, self._declared)
        self._waiting: dict[TopicPartition, list[pa.Table]] = {}
        self._waiting_bytes = 0
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix=f"encode {name}")
        self._encoding: Future[None] | None = None
        self.expected: dict[TopicPartition, int] = {}
        self.reached: dict[TopicPartition, int] = {}
        self.rows = 0
        self.encode_seconds = 0.0

    def add(self, rows: pa.Table) -> None:
        """Take rows, whose offsets ascend within each (topic, partition), on from those taken before.

        Waits for the encoder when that is a row group behind: whoever reads the source is then slowed down to what can be
        written.

        Raises:
            Retryable: offsets that do not ascend, or lie before the position: rows that were read before.
            ChecksFailed, Terminal: see lakehouse.checks.check_rows and lakehouse.staging.conform.
        """
        rows = conform(self._table, rows)
        for key, run in _runs(rows):
            self._advance(key, run.column("offset"))
            self._waiting.setdefault(key, []).append(run)
        self.rows += rows.num_rows
        self._waiting_bytes += rows.nbytes
        if self._waiting_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def commit(self) -> Committed:
        """Publish the batch: all of its rows and the positions after them, or nothing.

        Raises:
            Fenced, RolledBack, Replan, ChecksFailed, CommitUnresolved: see lakehouse.errors; nothing was published.
        """
        try:
            self._flush()
            self._wait()
            files = self._files.close()
            failpoints.hit("stage.written")
            if not self._keyed:
                with connect(self._lake.settings) as connection:
                    check_staged(connection, self._declared, files)
        except BaseException:
            self.abandon()
            raise
        self._encoder.shutdown()
        change = Change(self._name, self.expected, self.reached, add=files, sources=self._sources, updates=self._updates)
        return commit(self._table, self._lake.run, change)

    def abandon(self) -> None:
        """Drop the batch and its files. Not after `commit` has begun to publish: its files may be live then."""
        self._encoder.shutdown(wait=True, cancel_futures=True)
        self._files.abandon()
        self._waiting = {}

    def _advance(self, key: TopicPartition, offsets: pa.ChunkedArray) -> None:
        first, last = offsets[0].as_py(), offsets[-1].as_py()
        begin = self.reached.get(key, self._positions.get(key, 0))
        ascend = pc.all(pc.greater(offsets.slice(1), offsets.slice(0, len(offsets) - 1))).as_py()
        if first < begin or ascend is False:
            raise Retryable(
                f"{self._name}: {key[0]}[{key[1]}]: offsets {first} to {last} came again or out of order, where {begin} was due. "
                "Nothing was committed; run it again"
            )
        self.expected.setdefault(key, begin)
        self.reached[key] = last + 1

    def _flush(self) -> None:
        """Hand what waits to the encoder, in the order of the coordinates."""
        if not self._waiting:
            return
        group = pa.concat_tables(run for key in sorted(self._waiting) for run in self._waiting[key])
        self._waiting, self._waiting_bytes = {}, 0
        self._wait()
        self._encoding = self._encoder.submit(self._encode, group)

    def _wait(self) -> None:
        if self._encoding is not None:
            self._encoding.result()

    def _encode(self, rows: pa.Table) -> None:
        failpoints.hit("stage.begin")
        started = time.monotonic()
        refuse_nulls(self._table, self._declared, rows)
        if self._keyed:
            with connect(self._lake.settings) as connection:
                check_rows(connection, self._declared, rows, unique=self._declared.primary_key)
        if self._declared.sort != COORDINATES:
            rows = rows.sort_by([(c, "ascending") for c in self._declared.sort])
        self._files.write(rows)
        self.encode_seconds += time.monotonic() - started


def append_rows(
    lake: Lake,
    name: str,
    rows: pa.Table,
    expected: Vector,
    reached: Vector,
    sources: Mapping[str, str] | None = None,
    updates: Sequence[TableUpdate] = (),
) -> Committed:
    """Commit `rows` to a raw table together with the positions that its writer reached; again is refused, not repeated.

    expected: the positions the writer read when it began. sources: the origin of each topic (see `Position.source`).
    updates: see `Change`.

    Raises:
        Fenced, RolledBack, ChecksFailed, CommitUnresolved: see lakehouse.errors; nothing was published.
    """
    batch = Append(lake, name, expected, sources, updates)
    try:
        batch.add(rows.sort_by([(c, "ascending") for c in COORDINATES]))
        batch.expected, batch.reached = {**expected}, {**batch.reached, **reached}
    except BaseException:
        batch.abandon()
        raise
    return batch.commit()


def _runs(rows: pa.Table) -> Iterator[tuple[TopicPartition, pa.Table]]:
    """The rows cut, without a copy, wherever topic or partition changes."""
    cuts = {0, rows.num_rows}
    for name in ("topic", "partition"):
        column = rows.column(name)
        changes = pc.not_equal(column.slice(1), column.slice(0, max(0, len(column) - 1)))
        cuts.update(i + 1 for i in pc.indices_nonzero(changes.combine_chunks()).to_pylist())
    for start, end in zip(edges := sorted(cuts), edges[1:], strict=False):
        run = rows.slice(start, end - start)
        yield (run.column("topic")[0].as_py(), run.column("partition")[0].as_py()), run
