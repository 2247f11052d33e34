"""One consumer of one topic, from the table's positions on: what it reads, when it commits, and what makes it start over.

The positions in the table are the only truth about progress. Kafka's consumer group does no more than divide the partitions
among the processes that follow a topic: whatever it believes, a batch whose positions another writer has moved is refused
(Fenced), dropped, and read again from where the table stands. So a process that was stopped, cut off or declared dead can do
no harm when it wakes.

Memory is bounded by what is in hand: librdkafka's queue, one chunk of records, and the row groups of `lakehouse.append`. When
the encoder or the store is slow, `Append.add` waits, nothing is consumed, the queue fills, and librdkafka stops fetching.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient

from lakehouse import failpoints, metrics
from lakehouse.append import Append
from lakehouse.errors import Fenced, LakehouseError, Replan, Retryable, Terminal
from lakehouse.lake import Lake
from lakehouse.positions import read_positions, vector_of
from lakehouse.services import kafka_config
from writers.records import records_to_arrow
from writers.topics import FORBIDDEN, consumer_config, describe, explained, refuse_another

log = logging.getLogger(__name__)

# A call hands over what is there within the time, so it is bounded in bytes too: by librdkafka's queue and what comes meanwhile.
# Chunks of 1,024 to 8,192 records cost the same CPU time; the small ones hold less (about 1.6 MB here).
CHUNK_ROWS, CHUNK_SECONDS = 2_048, 0.05
# Each record is an object that Python's cycle collector counts: at its default of 700 it takes 1.0 us of 4.8 us an event.
COLLECT_EVERY = 100_000
STALLED_SECONDS = 30.0
WATCH_SECONDS = 1.0


@dataclass(frozen=True)
class Batch:
    """One committed micro-batch: its snapshot (None: nothing was new), rows, payload bytes; seconds from its first record on."""

    table: str
    snapshot_id: int | None
    rows: int
    payload_bytes: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Stream:
    """A topic and the raw table that it goes to. enrich: adds the table's further columns to RAW_SCHEMA columns."""

    table: str
    topic: str
    bootstrap: str
    enrich: Callable[[pa.Table], pa.Table]


@dataclass
class _Spent:
    """Seconds of the batch in hand by stage, and its payload bytes."""

    began: float
    read: float = 0.0
    convert: float = 0.0
    payload_bytes: int = 0


class Session:
    """Use it as a context manager, and call `drain` or `follow` once. Leaving it drops what was not committed.

    Raises:
        Retryable: no broker answers. Terminal: there is no such topic, or it is not the one that the positions came from.
    """

    def __init__(self, lake: Lake, stream: Stream, on_batch: Callable[[Batch], None] | None = None) -> None:
        self.commits = 0
        self._lake, self._stream, self._on_batch = lake, stream, on_batch
        self._admin = AdminClient(kafka_config(lake.settings, stream.bootstrap))
        self._source, self._partitions = describe(self._admin, stream.bootstrap, stream.topic)
        table = lake.open_for_write(stream.table)
        current = table.current_snapshot()
        metrics.announce(stream.table, current.timestamp_ms / 1000 if current else None)
        # Another table over the same topic, of another lake even, must not share the partitions with this one.
        group = f"lakehouse.{stream.table}.{table.metadata.table_uuid.hex[:12]}"
        config = consumer_config(stream.bootstrap, group, lake.settings)
        self._consumer = Consumer({**config, "error_cb": self._on_error})
        self._member = False
        self._held: set[int] = set()
        self._positions: dict[tuple[str, int], int] = {}
        self._batch: Append | None = None
        self._spent = _Spent(0.0)
        self._oldest: dict[int, float] = {}  # epoch seconds of the first record in hand
        self._failure: LakehouseError | None = None  # what went wrong in a callback, where nothing may be raised
        self._ahead: set[int] = set()
        self._ends: dict[int, int] = {}
        self._watched = 0.0
        self._looked = time.monotonic()

    def __enter__(self) -> Session:
        self._collect = gc.get_threshold()
        gc.set_threshold(COLLECT_EVERY, *self._collect[1:])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        gc.set_threshold(*self._collect)
        self._drop()
        self._forget(self._held)
        self._consumer.close()  # a member leaves the group: the others need not wait until its session ends

    def drain(self) -> None:
        """Commit what the topic holds now, all partitions."""
        self._ahead = set(self._partitions)
        self._start(self._partitions)
        heard = time.monotonic()
        while self._ahead:
            if self._turn():
                heard = time.monotonic()
            elif self._ahead and time.monotonic() - heard > STALLED_SECONDS:
                raise Retryable(f"nothing heard of {self._stream.topic} for {STALLED_SECONDS:.0f} s; is the broker up?")
        self._publish()

    def follow(self, stop: threading.Event) -> None:
        """Commit what comes, as a member of the group, until `stop` is set."""
        self._member = True
        self._consumer.subscribe(
            [self._stream.topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )
        while True:
            try:
                if stop.is_set():
                    self._publish()
                    return
                self._turn()
                self._look()
            except (Fenced, Replan) as refused:
                log.warning("%s", refused)
                self._start_over()

    def _turn(self) -> int:
        """Read a chunk, and commit if the batch is full or old; returns how many records came."""
        settings, batch = self._lake.settings, self._batch
        started = time.monotonic()
        found = self._consumer.consume(min(CHUNK_ROWS, settings.ingest_rows - (batch.rows if batch else 0)), CHUNK_SECONDS)
        read = time.monotonic() - started
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        errors = [m for m in found if m.error()]
        # a partition that was taken from us while its records were on their way is another's now
        if errors or not self._held.issuperset(map(Message.partition, found)):
            found = [m for m in found if not m.error() and m.partition() in self._held]
        if found:
            self._take(found, read)
        for message in errors:
            self._judge(message)
        batch = self._batch
        if batch is not None and (
            batch.rows >= settings.ingest_rows
            or self._spent.payload_bytes >= settings.ingest_bytes
            or time.monotonic() - self._spent.began >= settings.ingest_seconds
        ):
            self._publish()
        self._watch()
        return len(found)

    def _take(self, messages: list[Message], read: float) -> None:
        """Records into the batch in hand, or into a new one."""
        failpoints.hit("consume.read")
        if self._batch is None:
            self._batch = Append(self._lake, self._stream.table, self._positions, {self._stream.topic: self._source})
            self._spent = _Spent(time.monotonic() - read)
        started = time.monotonic()
        rows = self._stream.enrich(records_to_arrow(messages))
        converted = time.monotonic()
        self._batch.add(rows)
        self._spent.read += read
        self._spent.convert += converted - started
        self._spent.payload_bytes += pc.sum(pc.binary_length(rows.column("payload"))).as_py() or 0
        if self._oldest.keys() < self._held:
            first = rows.select(["partition", "received_at"]).group_by("partition").aggregate([("received_at", "min")])
            for partition, at in zip(*(column.to_pylist() for column in first.columns), strict=True):
                self._oldest.setdefault(partition, at.timestamp())
        for partition in self._ahead & set(rows.column("partition").unique().to_pylist()):
            self._mark_end(partition)

    def _mark_end(self, partition: int) -> None:
        """Take a partition out of those to drain once the end that was first seen of it is reached."""
        topic = self._stream.topic
        if partition not in self._ends:
            # of the embedded broker only the end that came with a fetch is right
            _, self._ends[partition] = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), cached=True)
        assert self._batch is not None
        if 0 <= self._ends[partition] <= self._batch.reached[topic, partition]:
            self._ahead.discard(partition)

    def _judge(self, message: Message) -> None:
        """What came instead of a record."""
        error = message.error()
        assert error is not None
        if error.code() == KafkaError._PARTITION_EOF:
            self._ahead.discard(message.partition())
        elif failure := explained(error, self._stream.table, self._stream.topic, message.partition()):
            raise failure

    def _publish(self) -> None:
        """Commit the batch in hand, if there is one."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        table, topic, spent = self._stream.table, self._stream.topic, self._spent
        try:
            self._refuse_another_topic()
        except BaseException:
            batch.abandon()
            raise
        started = time.monotonic()
        try:
            done = batch.commit()
        except Fenced:
            metrics.FENCED.labels(table).inc()
            raise
        self._positions.update(batch.reached)
        self._oldest.clear()
        metrics.committed(table, batch.rows, spent.payload_bytes)
        stages = (spent.read, spent.convert, batch.encode_seconds, time.monotonic() - started)
        for stage, seconds in zip(metrics.STAGES, stages, strict=True):
            metrics.BATCH_SECONDS.labels(table, stage).observe(seconds)
        if self._member:  # what Kafka's own tools show of a group is advice: nobody here reads it
            with contextlib.suppress(KafkaException):
                offsets = [TopicPartition(topic, p, offset) for (_, p), offset in batch.reached.items()]
                self._consumer.commit(offsets=offsets, asynchronous=True)
        self.commits += 1
        if self._on_batch:
            seconds = round(time.monotonic() - spent.began, 3)
            self._on_batch(Batch(table, done.snapshot_id, batch.rows, spent.payload_bytes, seconds))

    def _refuse_another_topic(self) -> None:
        """A topic that was created again while it was read: its offsets mean other records, and its id is another."""
        source, _ = describe(self._admin, self._stream.bootstrap, self._stream.topic)
        if source != self._source:
            raise Terminal(
                f"{self._stream.table}: topic {self._stream.topic!r} was created again while it was read ({self._source} then, "
                f"{source} now). The batch was dropped: its offsets may mean records of either. See: lakehouse positions show"
            )

    def _start(self, partitions: Iterable[int]) -> None:
        """Begin to read partitions where the table stands now, or where Kafka's log begins if it never read them."""
        table, topic = self._stream.table, self._stream.topic
        known = read_positions(self._lake.open_for_write(table).metadata).get(table, {})
        self._refuse_another_topic()
        refuse_another(table, topic, known, self._source)
        assigned = []
        for p in partitions:
            self._held.add(p)
            self._positions.pop((topic, p), None)
            if position := known.get((topic, p)):
                self._positions[topic, p] = position.next_offset
            assigned.append(TopicPartition(topic, p, self._positions.get((topic, p), OFFSET_BEGINNING)))
        self._consumer.incremental_assign(assigned)

    def _start_over(self) -> None:
        """Read the partitions held again from where the table stands now."""
        held = sorted(self._held)
        self._drop()
        self._consumer.incremental_unassign([TopicPartition(self._stream.topic, p) for p in held])
        self._start(held)

    def _drop(self) -> None:
        batch, self._batch = self._batch, None
        self._oldest.clear()
        if batch is not None:
            batch.abandon()

    def _forget(self, partitions: Iterable[int]) -> None:
        for p in list(partitions):
            self._held.discard(p)
            self._positions.pop((self._stream.topic, p), None)
            for gauge in (metrics.LAG_RECORDS, metrics.LAG_SECONDS):
                with contextlib.suppress(KeyError):
                    gauge.remove(self._stream.table, str(p))

    def _look(self) -> None:
        """Raise Replan if the table no longer stands where we think: rolled back, or its positions set by hand.

        A commit is refused then, but only if its batch has records of a partition that was moved; one that gets no new records
        would wait for the next. Raises RolledBack if it was not our command that took the table back.
        """
        if (now := time.monotonic()) - self._looked < self._lake.settings.ingest_seconds:
            return
        self._looked = now
        table, topic = self._stream.table, self._stream.topic
        try:
            known = vector_of(self._lake.open_for_write(table).metadata, table)
        except Retryable as outage:  # what was read may still be committed when the catalog is back
            log.info("%s: not looked whether its positions were moved: %s", table, outage)
            return
        if moved := sorted(p for p in self._held if known.get((topic, p)) != self._positions.get((topic, p))):
            raise Replan(f"{table}: the positions of {topic}{moved} were moved; going on from there")

    def _watch(self) -> None:
        """How far behind this process is, once a second."""
        if (now := time.monotonic()) - self._watched < WATCH_SECONDS:
            return
        self._watched = now
        for p in self._held:
            low, high = self._consumer.get_watermark_offsets(TopicPartition(self._stream.topic, p), cached=True)
            stands = max(low, self._positions.get((self._stream.topic, p), 0))
            metrics.LAG_RECORDS.labels(self._stream.table, str(p)).set(max(0, high - stands))
            age = max(0.0, time.time() - self._oldest[p]) if p in self._oldest else 0.0
            metrics.LAG_SECONDS.labels(self._stream.table, str(p)).set(age)

    def _on_assign(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        with self._failures_kept():
            self._start([p.partition for p in partitions])

    def _on_revoke(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Commit what is in hand before another takes the partitions over; if that fails they read it again."""
        taken = {p.partition for p in partitions}
        with self._failures_kept():
            if self._batch is not None and taken & {p for _, p in self._batch.reached}:
                self._publish()
        self._forget(taken)

    def _on_lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Others read these partitions already: what is in hand would only be refused."""
        lost = {p.partition for p in partitions}
        concerned = self._batch is not None and bool(lost & {p for _, p in self._batch.reached})
        self._forget(lost)
        if concerned:
            self._failure = self._failure or Replan(f"{self._stream.table}: {sorted(lost)} were lost; the batch was dropped")

    @contextlib.contextmanager
    def _failures_kept(self) -> Iterator[None]:
        """What fails in a callback is raised when `consume` has returned: the client must have its answer first."""
        try:
            yield
        except LakehouseError as failure:
            self._failure = self._failure or failure

    def _on_error(self, error: KafkaError) -> None:
        if error.code() in FORBIDDEN:
            self._failure = self._failure or explained(error, self._stream.table, self._stream.topic, None)
        else:
            log.info("%s: %s", self._stream.table, error.str())
