"""A topic full of realistic product events, and the writers that read it: what the benchmarks of ingestion share."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
from confluent_kafka import Producer

from benchmarks.measure import peak_rss_mb
from lakehouse.broker import EmbeddedBroker, ensure_topics
from lakehouse.local.kafka import KafkaBroker, why_unavailable
from simulator.world import WorldConfig, build_world

TABLE = "raw.product_events"
PARTITIONS = 8
PRODUCER = {
    "acks": "1",
    "compression.type": "lz4",
    "linger.ms": 20,
    "batch.size": 262_144,
    "queue.buffering.max.messages": 500_000,
    "queue.buffering.max.kbytes": 262_144,
    "delivery.report.only.error": True,
}


@functools.cache
def broker(say: Callable[[str], None]) -> KafkaBroker | EmbeddedBroker:
    """One node of Apache Kafka for all runs, ended with this process; the embedded broker, and a word, where there is none."""
    folder = tempfile.TemporaryDirectory(prefix="bench-kafka-")
    atexit.register(folder.cleanup)
    if reason := why_unavailable():
        say(f"on the embedded broker: {reason}")
        return EmbeddedBroker(Path(folder.name)).start()
    return KafkaBroker(Path(folder.name)).start()


def events(count: int) -> Iterator[tuple[bytes, bytes]]:
    """(workspace, payload) of so many events of the simulated company, all different."""
    world = build_world(WorldConfig(seed=7, customers=300, days=60, product_events=count))
    made = (
        pair
        for table in world.product_records.slices(0, 2**60)
        for frame in [pl.DataFrame(table).unique("payload", keep="first", maintain_order=True)]
        for pair in zip(frame["key"].to_list(), frame["payload"].to_list(), strict=True)
    )
    return islice(made, count)


@functools.cache
def preloaded(servers: str, count: int) -> str:
    """A topic that holds `count` events, made once for all runs; returns its name."""
    topic = f"bench.ingest.{count}"
    ensure_topics(servers, {topic: PARTITIONS})
    producer = Producer({"bootstrap.servers": servers, **PRODUCER})
    for number, (key, payload) in enumerate(events(count)):
        while True:
            try:
                producer.produce(topic, payload, key)
                break
            except BufferError:
                producer.poll(0.1)
        if number % 10_000 == 0:
            producer.poll(0)
    assert producer.flush(60) == 0
    return topic


@dataclass
class Writer:
    """`lakehouse ingest --follow` as a process; batches: (when its line came, the line), seconds as of time.time()."""

    process: subprocess.Popen[str]
    batches: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    cpu_seconds: float = 0.0
    peak_rss_mb: float = 0.0

    @property
    def rows(self) -> int:
        """Rows committed so far."""
        return sum(batch["rows"] for _, batch in self.batches)

    def listen(self) -> None:
        """Take down its batches until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.batches.append((time.time(), json.loads(line)))

    def end(self) -> None:
        """SIGTERM, and what it used."""
        self.peak_rss_mb = peak_rss_mb(self.process.pid)  # all is committed: ending takes no more
        self.process.send_signal(signal.SIGTERM)
        _, status, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_seconds = used.ru_utime + used.ru_stime


@contextmanager
def writers(number: int, servers: str, topic: str, environment: dict[str, str]) -> Iterator[list[Writer]]:
    """So many writers over the lake that the environment names, while the context is open; what they used is known after it."""
    own = {"LAKEHOUSE_KAFKA_BOOTSTRAP": servers, "LAKEHOUSE_PRODUCT_TOPIC": topic, **environment}
    command = [sys.executable, "-m", "lakehouse", "ingest", "--follow", TABLE, "--json"]
    running = [
        Writer(
            subprocess.Popen(
                command,
                env=os.environ | own,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
        for _ in range(number)
    ]
    for writer in running:
        threading.Thread(target=writer.listen, daemon=True).start()
    try:
        yield running
    finally:
        for writer in running:
            writer.end()
