"""Ingestion: a preloaded topic to committed Iceberg, by two writer processes, the broker on the same machine.

Figures of a run: events_per_second, from the first record that a writer reads to the last commit; cpu_us_per_event and
peak_rss_mb (the larger) of the writers, start included; seconds, from the start of the processes; zstd_ratio, payload bytes by
bytes of the files; batches; apache_kafka, 1 if the broker was real. Every event must be there once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.topic import TABLE, broker, preloaded, writers
from lakehouse.lake import Run, open_lake
from lakehouse.local.kafka import KafkaBroker
from lakehouse.settings import Settings

EVENTS = 5_000_000
WRITERS = 2
PATIENCE_SECONDS = 300.0
# The last batches are not full: they are committed when they are this old, which the wall clock counts too.
SECONDS_A_BATCH = "2"


def one_run(scale: float, say: Callable[[str], None]) -> dict[str, float]:
    """Ingest the topic into a lake of its own."""
    events = int(EVENTS * scale)
    node = broker(say)
    say(f"loading {events:,} events into Kafka (once, not timed)")
    topic = preloaded(node.bootstrap_servers, events)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        home = Path(folder) / "home"
        settings = Settings(home=home)  # type: ignore[call-arg]
        lake = open_lake(settings, Run("bench", "bench"))
        lake.open_for_write(TABLE)
        started = time.time()
        environment = {"LAKEHOUSE_HOME": str(home), "LAKEHOUSE_INGEST_SECONDS": SECONDS_A_BATCH}
        with writers(WRITERS, node.bootstrap_servers, topic, environment) as running:
            while (done := sum(w.rows for w in running)) < events:
                assert all(w.process.poll() is None for w in running), "a writer ended by itself"
                assert time.time() - started < PATIENCE_SECONDS, f"{done:,} of {events:,} events after {PATIENCE_SECONDS:.0f} s"
                say(f"{done:,} of {events:,} events committed")
                time.sleep(0.05)
        batches = [batch for writer in running for batch in writer.batches]
        first, last = min(at - batch["seconds"] for at, batch in batches), max(at for at, _ in batches)
        table = lake.load(TABLE)
        assert sum(lake.vector(TABLE).values()) == events
        files = [task.file for task in table.scan().plan_files()]
        assert sum(file.record_count for file in files) == events
    return {
        "events": events,
        "events_per_second": round(events / (last - first)),
        "cpu_us_per_event": round(sum(w.cpu_seconds for w in running) / events * 1e6, 2),
        "peak_rss_mb": round(max(w.peak_rss_mb for w in running)),
        "seconds": round(last - started, 2),
        "zstd_ratio": round(sum(b["payload_bytes"] for _, b in batches) / sum(f.file_size_in_bytes for f in files), 2),
        "batches": len(batches),
        "apache_kafka": float(isinstance(node, KafkaBroker)),
    }
