"""The Kafka writer against a real broker: every record as received, once; what cannot go on stops and says so."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from lakehouse.broker import ensure_topics
from lakehouse.errors import Fenced, Retryable, Terminal, UsageError
from lakehouse.lake import Lake, Run, history, open_lake
from lakehouse.processes import free_port
from lakehouse.services import Services
from lakehouse.settings import Settings
from tests.brokers import Broker
from tests.feed import rows
from writers import topics
from writers.jobs import ingest
from writers.kafka import Batch, Stream
from writers.kafka import ingest as ingest_topic
from writers.records import received_by_kafka

RAW = "raw.product_events"
TOPIC = "product.events.test"


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return open_lake(Settings(home=tmp_path / "home", ingest_rows=7), Run("test", "test"))


@pytest.fixture
def topic(broker: Broker, request: pytest.FixtureRequest) -> str:
    name = f"{TOPIC}.{request.node.name.partition('[')[0]}"
    ensure_topics(broker.bootstrap_servers, {name: 3})
    return name


def produce(broker: Broker, topic: str, *records: tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]) -> None:
    producer = Producer({"bootstrap.servers": broker.bootstrap_servers, "acks": "all", "message.max.bytes": 4_000_000})
    for i, (key, value, headers) in enumerate(records):
        producer.produce(topic, value, key, partition=i % 3, headers=headers, timestamp=1_767_225_600_000 + i)
    assert producer.flush(10) == 0


def bring(lake: Lake, broker: Broker, topic: str) -> int:
    found: list[Batch] = []
    ingest_topic(lake, Stream(RAW, topic, broker.bootstrap_servers, received_by_kafka), found.append)
    return sum(b.rows for b in found)


def test_records_are_stored_as_received(lake: Lake, broker: Broker, topic: str) -> None:
    odd = [
        (b"k", b'{"a": 1}', [("h", b"v")]),
        (None, None, []),
        (b"", b"", [("twice", b"1"), ("twice", None), ("bin", b"\x00\xff")]),
        (b"\xff\x00", "härz ☃ \u0000".encode(), []),
        (b"big", bytes(range(256)) * 4096, []),
        (b"latin", "ä".encode("latin-1"), []),
    ]
    produce(broker, topic, *odd)
    assert bring(lake, broker, topic) == len(odd)
    found = rows(lake, f'SELECT key, payload, headers, received_at, partition FROM {RAW} ORDER BY received_at, "offset"')
    assert [(r["key"], r["payload"], [(h["key"], h["value"]) for h in r["headers"]]) for r in found] == odd
    assert found[0]["received_at"] == datetime(2026, 1, 1, tzinfo=UTC)
    assert [r["partition"] for r in found] == [0, 1, 2, 0, 1, 2]


def test_batches_are_bounded_and_ingesting_again_adds_nothing(lake: Lake, broker: Broker, topic: str) -> None:
    produce(broker, topic, *((b"k", b"%d" % i, []) for i in range(30)))
    assert bring(lake, broker, topic) == 30
    summaries = [s.summary.additional_properties for s in history(lake.load(RAW)) if s.summary]
    assert [int(s["added-records"]) for s in summaries] == [2, 7, 7, 7, 7]
    assert bring(lake, broker, topic) == 0
    assert len(history(lake.load(RAW))) == 5
    produce(broker, topic, (b"k", b"one more", []))
    assert bring(lake, broker, topic) == 1
    coordinates = rows(lake, f'SELECT count(*) AS n, count(DISTINCT (topic, partition, "offset")) AS distinct_n FROM {RAW}')
    assert coordinates == [{"n": 31, "distinct_n": 31}]


def test_two_writers_at_once_store_each_record_once(lake: Lake, broker: Broker, topic: str, tmp_path: Path) -> None:
    """Both read the same partitions: one commits, the other is fenced and drops its buffer. Nothing is lost or doubled."""
    produce(broker, topic, *((b"k", b"%d" % i, []) for i in range(60)))
    lake.open_for_write(RAW)
    outcomes: list[str] = []

    def work(number: int) -> None:
        other = open_lake(lake.settings, Run(f"writer-{number}", "test"))
        try:
            bring(other, broker, topic)
            outcomes.append("caught up")
        except Fenced:
            outcomes.append("fenced")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(outcomes) == 3
    bring(lake, broker, topic)
    found = rows(lake, f"SELECT payload FROM {RAW}")
    assert sorted(int(r["payload"]) for r in found) == list(range(60))


def test_a_topic_created_again_is_noticed(lake: Lake, broker: Broker, topic: str) -> None:
    produce(broker, topic, (b"k", b"1", []))
    bring(lake, broker, topic)
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    admin.delete_topics([topic])[topic].result()
    ensure_topics(broker.bootstrap_servers, {topic: 3})
    produce(broker, topic, (b"k", b"another", []))
    with pytest.raises(Terminal, match="created again"):
        bring(lake, broker, topic)
    assert rows(lake, f"SELECT count(*) AS n FROM {RAW}") == [{"n": 1}]


def test_a_missing_topic(lake: Lake, broker: Broker) -> None:
    with pytest.raises(Terminal, match=r"no topic 'nowhere'"):
        bring(lake, broker, "nowhere")
    assert not lake.exists(RAW), "nothing half-written"


def test_a_missing_broker(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topics, "TIMEOUT_SECONDS", 0.5)
    with pytest.raises(Retryable, match="no Kafka broker answers"):
        ingest_topic(lake, Stream(RAW, "t", f"127.0.0.1:{free_port()}", received_by_kafka))
    assert not lake.exists(RAW), "nothing half-written"


def test_only_sources_can_be_ingested(lake: Lake) -> None:
    with pytest.raises(UsageError, match=r"product\.events.*sources: raw\.stripe_events"):
        ingest(lake, Services("127.0.0.1:1", "t", "s", "sqlite://"), ["product.events"])
