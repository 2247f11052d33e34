"""Freshness: under a steady load, the seconds from a record's arrival in Kafka until it can be queried in the raw table.

Figures of a run: p50_seconds, p95_seconds, p99_seconds over all rows, from the Kafka timestamp to when the new snapshot was
seen from outside (looked for every 50 ms); events_per_second that were produced; commits; cpu_us_per_event of the writer. One
writer with the default settings (a batch is scaled as the run is).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
from confluent_kafka import Producer

from benchmarks.topic import PARTITIONS, PRODUCER, TABLE, broker, events, writers
from lakehouse.broker import ensure_topics
from lakehouse.lake import Run, history, open_lake
from lakehouse.settings import Settings

EVENTS_PER_SECOND = 10_000
SECONDS = 150


def one_run(scale: float, say: Callable[[str], None]) -> dict[str, float]:
    """Produce evenly, and see when what was produced is there."""
    node = broker(say)
    count = int(EVENTS_PER_SECOND * SECONDS * scale)
    topic = f"bench.freshness.{time.time_ns()}"
    ensure_topics(node.bootstrap_servers, {topic: PARTITIONS})
    made = events(count)
    producer = Producer({"bootstrap.servers": node.bootstrap_servers, **PRODUCER, "linger.ms": 5})
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        home = Path(folder) / "home"
        settings = Settings(home=home)  # type: ignore[call-arg]
        lake = open_lake(settings, Run("bench", "bench"))
        table = lake.open_for_write(TABLE)
        seen: dict[int, float] = {}
        age = lake.settings.ingest_seconds * min(1.0, scale)
        environment = {"LAKEHOUSE_HOME": str(home), "LAKEHOUSE_INGEST_SECONDS": str(age)}
        with writers(1, node.bootstrap_servers, topic, environment) as (writer,):
            time.sleep(5.0)  # it has joined its group
            began, sent = time.time(), 0
            while writer.rows < count:
                due = min(count, int((time.time() - began) * EVENTS_PER_SECOND) + 1)
                for key, payload in (next(made) for _ in range(due - sent)):
                    producer.produce(topic, payload, key)
                sent = due
                producer.poll(0)
                time.sleep(0.05)
                if current := table.refresh().current_snapshot():
                    seen.setdefault(current.snapshot_id, time.time())
                say(f"{writer.rows:,} of {count:,} events committed")
                assert time.time() - began < SECONDS * scale + 120, "the writer does not keep up"
            rate = count / (SECONDS * scale)
        now = time.time()
        ages = pl.concat([_ages(table.refresh(), s.snapshot_id, seen.get(s.snapshot_id, now)) for s in history(table)])
        assert ages.len() == count
    quantiles = {f"p{q}_seconds": round(float(ages.quantile(q / 100) or 0.0), 2) for q in (50, 95, 99)}
    return {
        **quantiles,
        "events_per_second": round(rate),
        "commits": len(seen),
        "cpu_us_per_event": round(writer.cpu_seconds / count * 1e6, 2),
    }


def _ages(table, snapshot_id: int, seen_at: float) -> pl.Series:  # type: ignore[no-untyped-def]
    """Seconds from arrival to `seen_at` of the rows that a snapshot added."""
    snapshot = table.snapshot_by_id(snapshot_id)
    paths = {
        entry.data_file.file_path
        for manifest in snapshot.manifests(table.io)
        for entry in manifest.fetch_manifest_entry(table.io)
        if entry.snapshot_id == snapshot_id
    }
    arrived = [
        pl.Series(pq.read_table(p.removeprefix("file://"), columns=["kafka_timestamp"]).column(0).cast("int64")) for p in paths
    ]
    return seen_at - pl.concat(arrived) / 1e6 if arrived else pl.Series([], dtype=pl.Float64)
