"""The Kafka writer against a real broker: every record as received, once; what cannot go on stops and says so."""

from __future__ import annotations

import ctypes
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource
from prometheus_client import REGISTRY

from lakehouse.broker import ensure_topics
from lakehouse.errors import Fenced, Retryable, Terminal, UsageError
from lakehouse.lake import Lake, Run, history, open_lake
from lakehouse.local.kafka import KafkaBroker
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


def test_a_producer_with_a_broken_clock_holds_up_nobody(lake: Lake, broker: Broker, topic: str) -> None:
    """A timestamp that is no date of the years 1 to 9999 is stored as none: the record was received by now."""
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    if isinstance(broker, KafkaBroker):  # since 4.0 it refuses what lies more than an hour ahead, unless told otherwise
        allow = [ConfigEntry("message.timestamp.after.max.ms", str(2**63 - 1), incremental_operation=AlterConfigOpType.SET)]
        for done in admin.incremental_alter_configs([ConfigResource("topic", topic, incremental_configs=allow)]).values():
            done.result(10)
    producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
    for offset, at in enumerate([1_767_225_600_000, 253_402_300_800_000, 2**62, 1]):
        producer.produce(topic, b"%d" % offset, partition=0, timestamp=at)
    assert producer.flush(10) == 0
    assert bring(lake, broker, topic) == 4
    found = rows(lake, f"SELECT payload, kafka_timestamp AS at, received_at > '2026-01-02' AS by_now FROM {RAW} ORDER BY payload")
    assert [r["payload"] for r in found] == [b"0", b"1", b"2", b"3"]
    assert [r["at"] and r["at"].year for r in found] == [2026, None, None, 1970]
    assert [r["by_now"] for r in found] == [False, True, True, False]


def test_a_header_whose_name_is_not_utf8_holds_up_nobody(
    lake: Lake, broker: Broker, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client cannot hand it over, so the record is stored without its headers, and the log says which it was."""
    produce(broker, topic, (b"k", b"before", [("h", b"v")]))
    produce_with_header(broker, topic, b"bad \xff name")
    produce(broker, topic, (b"k", b"after", [("h", b"v")]))
    assert bring(lake, broker, topic) == 3
    found = rows(lake, f'SELECT payload, headers FROM {RAW} WHERE partition = 0 ORDER BY "offset"')
    good = [{"key": "h", "value": b"v"}]
    assert [(r["payload"], r["headers"]) for r in found] == [(b"before", good), (b"it", None), (b"after", good)]
    assert f"{topic}[0] at offset 1: a header's name is not UTF-8" in caplog.text


def produce_with_header(broker: Broker, topic: str, name: bytes) -> None:
    """One record to partition 0, by the C library: confluent-kafka takes header names as text alone."""
    import confluent_kafka.cimpl

    kafka = ctypes.CDLL(confluent_kafka.cimpl.__file__)  # the C library's functions are found through what links it
    for function in (kafka.rd_kafka_conf_new, kafka.rd_kafka_new, kafka.rd_kafka_headers_new):
        function.restype = ctypes.c_void_p
    said = ctypes.create_string_buffer(512)
    config = ctypes.c_void_p(kafka.rd_kafka_conf_new())
    kafka.rd_kafka_conf_set(config, b"bootstrap.servers", broker.bootstrap_servers.encode(), said, len(said))
    client = ctypes.c_void_p(kafka.rd_kafka_new(0, config, said, len(said)))
    headers = ctypes.c_void_p(kafka.rd_kafka_headers_new(ctypes.c_size_t(1)))
    kafka.rd_kafka_header_add(headers, name, ctypes.c_ssize_t(len(name)), b"v", ctypes.c_ssize_t(1))
    where = (1, ctypes.c_char_p(topic.encode()), 3, ctypes.c_int32(0))  # RD_KAFKA_VTYPE_TOPIC, _PARTITION, _VALUE, _HEADERS
    assert kafka.rd_kafka_producev(client, *where, 4, ctypes.c_char_p(b"it"), ctypes.c_size_t(2), 10, headers, 0) == 0
    assert kafka.rd_kafka_flush(client, 10_000) == 0
    kafka.rd_kafka_destroy(client)


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


def test_a_writer_that_was_overtaken_is_fenced_and_counted(lake: Lake, broker: Broker, topic: str) -> None:
    """After its first batch another one reads the topic to its end; its second batch is dropped."""
    produce(broker, topic, *((b"k", b"%d" % i, []) for i in range(30)))
    before = REGISTRY.get_sample_value("lakehouse_fenced_total", {"table": RAW}) or 0.0
    other = open_lake(lake.settings, Run("other", "test"))
    with pytest.raises(Fenced):
        ingest_topic(lake, Stream(RAW, topic, broker.bootstrap_servers, received_by_kafka), lambda _: bring(other, broker, topic))
    assert REGISTRY.get_sample_value("lakehouse_fenced_total", {"table": RAW}) == before + 1
    found = rows(lake, f"SELECT payload FROM {RAW}")
    assert sorted(int(r["payload"]) for r in found) == list(range(30))


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
