"""Kafka -> raw: records exactly as received, committed together with the offsets they end at.

`ingest` drains a topic: all partitions, up to their ends as first seen. `follow` goes on until it is told to stop, as one of any
number of processes. Both are the same loop (writers/session.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from lakehouse import metrics
from lakehouse.errors import Retryable
from lakehouse.lake import Lake
from writers.session import Batch, Session, Stream

__all__ = ["Batch", "Stream", "follow", "ingest"]

log = logging.getLogger(__name__)

GIVE_UP_SECONDS = 600.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 30.0


def ingest(lake: Lake, stream: Stream, on_batch: Callable[[Batch], None] | None = None) -> None:
    """Commit everything the topic holds at the time of the call, in micro-batches, from the table's positions on.

    Raises:
        Fenced: another writer works on these partitions; the buffer is dropped.
        Terminal: a position that Kafka no longer has, or a topic that was created again: never skipped over.
        Retryable: the broker went away.
    """
    with Session(lake, stream, on_batch) as session:
        session.drain()


def follow(lake: Lake, stream: Stream, stop: threading.Event, on_batch: Callable[[Batch], None] | None = None) -> None:
    """Commit what the topic brings until `stop` is set, as one member of the group; then commit what was read, and leave.

    What can pass (a broker or the Iceberg catalog away) costs the batch in hand: it is read again, after growing pauses.

    Raises:
        Terminal: as `ingest`. Retryable: it has failed for GIVE_UP_SECONDS without a commit in between.
    """
    wait, failing_since = FIRST_WAIT_SECONDS, None
    while not stop.is_set():
        began, session = time.monotonic(), None
        try:
            with Session(lake, stream, on_batch) as session:
                session.follow(stop)
        except Retryable as error:
            now = time.monotonic()
            if failing_since is None or (session and session.commits) or now - began > GIVE_UP_SECONDS:
                wait, failing_since = FIRST_WAIT_SECONDS, now
            if now - failing_since > GIVE_UP_SECONDS:
                raise
            metrics.RESTARTS.labels(stream.table).inc()
            log.warning("%s; the batch in hand is read again in %.0f s", error, wait)
            stop.wait(wait)
            wait = min(wait * 2, LONGEST_WAIT_SECONDS)
