"""A real run of the embedded broker: what it keeps of a record, and where it differs from Apache Kafka.

The differences are pinned so that a newer wheel that behaves otherwise is noticed, and the notes in
`lakehouse/broker.py` are corrected.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, Consumer, Message, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from lakehouse.broker import EmbeddedBroker, ensure_topics
from lakehouse.errors import Retryable, Terminal, UsageError
from lakehouse.processes import free_port

QUIET = {"log_level": 0}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(tmp_path_factory.mktemp("broker")) as running:
        yield running


def producer(broker: EmbeddedBroker) -> Producer:
    return Producer(
        {
            "bootstrap.servers": broker.bootstrap_servers,
            "acks": "all",
            "enable.idempotence": True,
            "message.max.bytes": 2_000_000,
            "linger.ms": 50,  # so that what is produced together is one batch
            **QUIET,
        }
    )


def consumer(broker: EmbeddedBroker) -> Consumer:
    return Consumer(
        {
            "bootstrap.servers": broker.bootstrap_servers,
            "group.id": "test",
            "auto.offset.reset": "error",
            "enable.auto.commit": False,
            "fetch.queue.backoff.ms": 5,
            **QUIET,
        }
    )


def read(reader: Consumer, topic: str, offset: int, count: int) -> list[Message]:
    reader.assign([TopicPartition(topic, 0, offset)])
    return reader.consume(count, timeout=5)


def topic_id(broker: EmbeddedBroker, topic: str) -> str:
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers, **QUIET})
    return str(admin.describe_topics(TopicCollection([topic]))[topic].result(5).topic_id)


def test_a_record_is_kept_as_it_was_produced(broker: EmbeddedBroker) -> None:
    ensure_topics(broker.bootstrap_servers, {"kept": 1})
    headers = [("received_at", b"2026-01-01"), ("source", b"a"), ("source", b"b"), ("null", None), ("empty", b"")]
    megabyte = os.urandom(1_048_576)
    client = producer(broker)
    client.produce("kept", b"\x00\xffbytes", key=b"k", headers=headers, timestamp=1_700_000_000_123)
    client.produce("kept", None, key=b"tombstone", timestamp=1_600_000_000_000)  # earlier than the one before it
    client.produce("kept", b"", key=None, timestamp=1_700_000_000_124)
    client.produce("kept", megabyte, key=b"", timestamp=1_700_000_000_125)
    assert client.flush(10) == 0

    records = read(consumer(broker), "kept", 0, 4)

    assert [r.offset() for r in records] == [0, 1, 2, 3]
    assert [r.key() for r in records] == [b"k", b"tombstone", None, b""]
    assert [r.value() for r in records] == [b"\x00\xffbytes", None, b"", megabyte]
    assert records[0].headers() == headers
    assert [r.timestamp() for r in records] == [
        (TIMESTAMP_CREATE_TIME, ms) for ms in (1_700_000_000_123, 1_600_000_000_000, 1_700_000_000_124, 1_700_000_000_125)
    ]


@pytest.mark.parametrize("codec", ["gzip", "lz4", "snappy", "zstd"])
def test_every_compression_codec_is_readable(broker: EmbeddedBroker, codec: str) -> None:
    topic = f"codec.{codec}"
    ensure_topics(broker.bootstrap_servers, {topic: 1})
    client = Producer({"bootstrap.servers": broker.bootstrap_servers, "compression.type": codec, **QUIET})
    for i in range(3):
        client.produce(topic, b"%d" % i * 1000)
    client.flush(10)
    assert [r.value() for r in read(consumer(broker), topic, 0, 3)] == [b"%d" % i * 1000 for i in range(3)]


def test_ensure_topics_is_idempotent_and_never_repartitions(broker: EmbeddedBroker) -> None:
    assert ensure_topics(broker.bootstrap_servers, {"a": 1, "b": 4}) == {"a": 1, "b": 4}
    first = topic_id(broker, "b")
    assert ensure_topics(broker.bootstrap_servers, {"a": 3, "b": 4, "c": 2}) == {"a": 1, "b": 4, "c": 2}
    assert topic_id(broker, "b") == first


def test_a_recreated_topic_has_another_id(broker: EmbeddedBroker) -> None:
    ensure_topics(broker.bootstrap_servers, {"again": 1})
    first = topic_id(broker, "again")
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers, **QUIET})
    admin.delete_topics(["again"])["again"].result(5)
    ensure_topics(broker.bootstrap_servers, {"again": 1})
    assert topic_id(broker, "again") != first


def test_differences_from_kafka_are_as_documented(broker: EmbeddedBroker) -> None:
    ensure_topics(broker.bootstrap_servers, {"differs": 1})
    partition = TopicPartition("differs", 0)
    client, reader = producer(broker), consumer(broker)
    for size in (10, 5):  # two batches: offsets 0..9 and 10..14
        for i in range(size):
            client.produce("differs", b"x", timestamp=1_700_000_000_000 + i * 1000)
        client.flush(10)

    assert reader.get_watermark_offsets(partition, timeout=5) == (0, 11)  # Kafka: (0, 15)
    assert [r.offset() for r in read(reader, "differs", 4, 11)] == list(range(4, 15))  # nothing is hidden by it
    assert reader.get_watermark_offsets(partition, cached=True)[1] == 15

    asked = TopicPartition("differs", 0, 1_700_000_005_000)
    assert reader.offsets_for_times([asked], timeout=5)[0].offset == 0  # Kafka: 5

    reader.assign([TopicPartition("differs", 0, 1_000)])
    assert reader.poll(1.5) is None  # Kafka: OFFSET_OUT_OF_RANGE, which auto.offset.reset=error turns into an error


def test_every_start_is_an_empty_log_with_another_cluster_id(tmp_path: Path) -> None:
    broker = EmbeddedBroker(tmp_path, free_port())
    seen = []
    for _ in range(2):
        with broker:
            admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers, **QUIET})
            listed = admin.list_topics(timeout=5)
            assert listed.cluster_id == broker.cluster_id
            assert not listed.topics
            ensure_topics(broker.bootstrap_servers, {"t": 1})
            seen.append((broker.cluster_id, topic_id(broker, "t")))
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]
    with pytest.raises(UsageError, match="not running"):
        _ = broker.bootstrap_servers


def test_a_taken_port_is_refused_by_name(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=rf"port {port} .*pass port 0"):
            EmbeddedBroker(tmp_path, port).start()


def test_a_broker_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "tansu"
    broken.write_text("#!/bin/sh\necho out of cheese; exit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr("lakehouse.broker._broker_binary", lambda _: broken)
    with pytest.raises(Terminal, match=r"exit code 3(.|\n)*out of cheese"):
        EmbeddedBroker(tmp_path).start()


def test_no_broker_is_retryable() -> None:
    with pytest.raises(Retryable, match="lakehouse up"):
        ensure_topics(f"127.0.0.1:{free_port()}", {"t": 1}, timeout_seconds=0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux only")
def test_the_broker_dies_with_its_parent_even_when_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from lakehouse.broker import EmbeddedBroker\n"
        "print(EmbeddedBroker(Path(sys.argv[1])).start().pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 5
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(pid)


def test_the_home_directory_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    with EmbeddedBroker(tmp_path / "state"):
        assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["broker.log"]
    assert not list(home.iterdir())


def _alive(pid: int) -> bool:
    """Whether the process still runs (a zombie, which nobody may be there to reap, does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
