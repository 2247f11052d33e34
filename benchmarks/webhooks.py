"""Webhooks: how many a second the receiver takes with each one durable in Kafka, and how long a sender waits.

Three parts on one machine: the broker (Apache Kafka where it can be started, else the embedded one), the receiver (`lakehouse up`
in a process of its own), a load generator in another. Bodies have the shapes of the simulator's events, 3 KB on average, each
with its own id and signature. First as fast as 32 connections go; then at a steady 150 a second, and for a while ten times that,
each event sent again and again as Stripe does after an outage: there latency counts from the moment a request was due, so
that a stall is not hidden by requests that were never sent. Afterwards the topic is read back: every 200 must be in it, byte
for byte.

Figures: requests_per_second, p50_ms, p95_ms, p99_ms (32 connections); steady_p99_ms, burst_p50_ms, burst_p95_ms, burst_p99_ms;
cpu_us_per_request (the receiver's), requests (answered 200), not_durable (200 and not in the topic: must be 0), apache_kafka (1,
or 0 for the embedded broker). Limits: 1,500 requests a second, 200 ms at p99.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from confluent_kafka import Consumer, Producer, TopicPartition

from benchmarks.webhooks_load import Load
from lakehouse.broker import EmbeddedBroker, ensure_topics
from lakehouse.local.kafka import KafkaBroker, available

SATURATED_SECONDS, STEADY_SECONDS, BURST_SECONDS = 10.0, 5.0, 5.0
TOPIC, PARTITIONS, SECRET = "stripe.webhooks", 2, "whsec_bench"


def one_run(scale: float, say: Callable[[str], None]) -> dict[str, float]:
    """One broker, one receiver, one load."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, _broker(Path(folder)) as (bootstrap, real):
        ensure_topics(bootstrap, {TOPIC: PARTITIONS})
        with _receiver(Path(folder), bootstrap) as (process, url):
            load = Load(
                url=url,
                secret=SECRET,
                saturated=max(0.5, SATURATED_SECONDS * scale),
                steady=max(0.5, STEADY_SECONDS * scale),
                burst=max(0.5, BURST_SECONDS * scale),
                answered=str(Path(folder) / "answered"),
            )
            say("sending")
            cpu = _cpu_seconds(process.pid)
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.webhooks_load"],
                input=load.to_json(),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            cpu = _cpu_seconds(process.pid) - cpu
        figures: dict[str, float] = json.loads(done.stdout)
        say("reading the topic back")
        kept = _digests(bootstrap)
        answered = (Path(folder) / "answered").read_text().split()
        missing = [d for d in answered if d not in kept]
    assert figures["refused"] == 0, f"{figures['refused']:.0f} requests were not answered 200"
    figures |= {
        "cpu_us_per_request": round(cpu / figures["requests"] * 1e6, 1),
        "not_durable": len(missing),
        "apache_kafka": int(real),
    }
    return figures


@contextlib.contextmanager
def _broker(folder: Path) -> Iterator[tuple[str, bool]]:
    if available():
        with KafkaBroker(folder / "kafka") as kafka:
            yield kafka.bootstrap_servers, True
        return
    with EmbeddedBroker(folder) as embedded:
        yield embedded.bootstrap_servers, False


@contextlib.contextmanager
def _receiver(folder: Path, bootstrap: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`lakehouse up` against that broker, in a process of its own; gives it and the URL to post to."""
    environment = {
        "LAKEHOUSE_HOME": str(folder / "home"),
        "LAKEHOUSE_KAFKA_BOOTSTRAP": bootstrap,
        "LAKEHOUSE_STRIPE_TOPIC": TOPIC,
        "LAKEHOUSE_WEBHOOK_SECRETS": json.dumps(["whsec_rolled", SECRET]),
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "lakehouse", "up"], env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        assert line[:1] == ["webhooks"], line
        yield process, line[1]
    finally:
        process.terminate()
        process.wait()


def _cpu_seconds(pid: int) -> float:
    """User and system time of a running process (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _digests(bootstrap: str) -> set[str]:
    """SHA-256 of each value in the topic up to now: a mark is produced to each partition and read up to."""
    mark = b"mark:" + uuid.uuid4().bytes
    producer = Producer({"bootstrap.servers": bootstrap})
    for partition in range(PARTITIONS):
        producer.produce(TOPIC, mark, partition=partition)
    assert producer.flush(10) == 0
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "bench", "auto.offset.reset": "error"})
    consumer.assign([TopicPartition(TOPIC, p, 0) for p in range(PARTITIONS)])
    found, marks, deadline = set(), 0, time.monotonic() + 60
    while marks < PARTITIONS:
        assert time.monotonic() < deadline, "the topic could not be read back"
        for message in consumer.consume(10_000, timeout=0.2):
            assert message.error() is None, message.error()
            value = message.value() or b""
            marks += value == mark
            found.add(hashlib.sha256(value).hexdigest())
    consumer.close()
    return found
