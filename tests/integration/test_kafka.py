"""One node of Apache Kafka on loopback: its log outlives it, it never outlives us, and what is missing is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition
from test_broker import _alive, topic_id

from lakehouse.broker import ensure_topics
from lakehouse.errors import Retryable, Terminal, UsageError
from lakehouse.local import kafka as launcher
from lakehouse.local.kafka import KafkaBroker, fetch_jars, why_unavailable
from lakehouse.processes import free_port
from lakehouse.settings import ROOT


@pytest.fixture
def node(tmp_path: Path) -> KafkaBroker:
    """A node of the test's own, not started."""
    if reason := why_unavailable():
        pytest.skip(reason)
    return KafkaBroker(tmp_path / "kafka")


def produce(node: KafkaBroker, topic: str, *values: bytes, timestamp: int = 0) -> None:
    producer = Producer(
        {
            "bootstrap.servers": node.bootstrap_servers,
            "acks": "all",
            "enable.idempotence": True,
            "message.max.bytes": 4_000_000,
            "log_level": 0,
        }
    )
    for value in values:
        producer.produce(topic, value, timestamp=timestamp)
    assert producer.flush(20) == 0


def read(node: KafkaBroker, topic: str, offset: int = 0, count: int = 1) -> list[Message]:
    reader = Consumer(
        {"bootstrap.servers": node.bootstrap_servers, "group.id": "t", "auto.offset.reset": "error", "log_level": 0}
    )
    reader.assign([TopicPartition(topic, 0, offset)])
    try:
        return reader.consume(count, timeout=20)
    finally:
        reader.close()


@pytest.mark.kafka
def test_the_log_outlives_a_kill_a_stop_and_a_pause(node: KafkaBroker) -> None:
    with node:
        ensure_topics(node.bootstrap_servers, {"t": 1})
        before = (node.bootstrap_servers, node.cluster_id, topic_id(node, "t"))
        produce(node, "t", b"one")
        node.kill()
        node.start()
        produce(node, "t", b"two")
        node.stop()
        node.start()
        assert (node.bootstrap_servers, node.cluster_id, topic_id(node, "t")) == before
        node.pause()
        with pytest.raises(Retryable, match="no Kafka broker answers"):
            ensure_topics(node.bootstrap_servers, {"t": 1}, timeout_seconds=0.5)
        node.resume()
        produce(node, "t", b"three")
        assert [r.value() for r in read(node, "t", count=3)] == [b"one", b"two", b"three"]
    assert not node.log_path.read_text().count("ERROR")


@pytest.mark.kafka
def test_a_renewed_node_is_another_empty_cluster_at_the_same_address(node: KafkaBroker) -> None:
    with node:
        before = (node.bootstrap_servers, node.cluster_id)
        ensure_topics(node.bootstrap_servers, {"gone": 1})
        assert node.coordinates_groups()
        node.renew()
        assert node.bootstrap_servers == before[0]
        assert node.cluster_id != before[1]
        assert ensure_topics(node.bootstrap_servers, {"new": 1}) == {"new": 1}
        assert node.coordinates_groups()
    assert not node.coordinates_groups()


def test_it_is_a_kafka_where_the_embedded_broker_is_not(kafka: KafkaBroker) -> None:
    """Each difference that `test_broker.py` pins, the other way round; and large or old records as production allows them."""
    ensure_topics(kafka.bootstrap_servers, {"real": 1})
    produce(kafka, "real", *[b"x"] * 10, timestamp=1_700_000_000_000)
    produce(kafka, "real", *[b"y"] * 5, os.urandom(2_000_000), timestamp=1_700_000_005_000)
    reader = Consumer(
        {"bootstrap.servers": kafka.bootstrap_servers, "group.id": "t2", "auto.offset.reset": "error", "log_level": 0}
    )
    assert reader.get_watermark_offsets(TopicPartition("real", 0), timeout=5) == (0, 16)
    assert reader.offsets_for_times([TopicPartition("real", 0, 1_700_000_001_000)], timeout=5)[0].offset == 10
    reader.close()
    (beyond,) = read(kafka, "real", offset=1_000)
    assert beyond.error() is not None
    assert "out of range" in beyond.error().str().lower()
    failed: list[object] = []  # no topic comes to be by being written to
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "message.timeout.ms": 1_000, "log_level": 0})
    producer.produce("misspelt", b"x", on_delivery=lambda error, _: failed.append(error))
    producer.flush(5)
    assert failed[0] is not None


@pytest.mark.kafka
def test_a_taken_port_is_refused_by_name(kafka: KafkaBroker, tmp_path: Path) -> None:
    port = int(kafka.bootstrap_servers.rpartition(":")[2])
    with pytest.raises(UsageError, match=rf"port {port} .*pass port 0"):
        KafkaBroker(tmp_path, port).start()


@pytest.mark.kafka
def test_a_node_that_cannot_start_says_why(node: KafkaBroker, tmp_path: Path) -> None:
    (tmp_path / "kafka" / "data").mkdir(parents=True)
    (tmp_path / "kafka" / "data" / "meta.properties").write_text("version=1\nnode.id=7\ncluster.id=x\n")
    with pytest.raises(Terminal, match=r"ended at once \(exit code 1\)(.|\n)*node.id"):
        node.start()


@pytest.mark.kafka
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux only")
def test_make_kafka_prints_where_it_is_and_ends_with_its_parent(node: KafkaBroker, tmp_path: Path) -> None:
    """The command of the Makefile; killed outright it takes the node with it."""
    command = subprocess.Popen(
        [sys.executable, "-m", "lakehouse.local.kafka", "--dir", str(tmp_path / "k"), "--port", str(free_port())],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert command.stdout is not None
    said = [command.stdout.readline(), command.stdout.readline()]
    assert said[1].startswith("export LAKEHOUSE_KAFKA_BOOTSTRAP=127.0.0.1:")
    bootstrap = said[1].strip().rpartition("=")[2]
    assert ensure_topics(bootstrap, {"t": 1}) == {"t": 1}
    (child,) = subprocess.run(["pgrep", "-P", str(command.pid)], capture_output=True, text=True).stdout.split()
    command.send_signal(signal.SIGKILL)
    command.wait()
    deadline = time.monotonic() + 10
    while _alive(int(child)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(int(child))


def test_what_is_missing_is_said_with_the_command_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(launcher.shutil, "which", lambda name: f"/bin/{name}")
    assert "make kafka-jars" in why_unavailable()
    with pytest.raises(UsageError, match="make kafka-jars"):
        KafkaBroker(tmp_path).start()
    monkeypatch.setattr(launcher.shutil, "which", lambda name: None)
    assert "java" in why_unavailable()
    with pytest.raises(UsageError, match="mvn"):
        fetch_jars()


def test_jars_that_cannot_be_fetched_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Maven that reaches no repository, and one that hangs: said shortly, and the next attempt begins anew."""
    mvn = tmp_path / "bin" / "mvn"
    mvn.parent.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{mvn.parent}:{os.environ['PATH']}")
    for script, match in (("echo no route to host; exit 1", "no route to host"), ("exec sleep 30", "within 1 s")):
        mvn.write_text(f"#!/bin/sh\n{script}\n")
        mvn.chmod(0o700)
        with pytest.raises(Retryable, match=match):
            fetch_jars(timeout_seconds=1)
        assert list((tmp_path / "cache" / "streamforge").iterdir()) == []
