"""Writers against a real broker and a real CRM database: every record as received, once; what cannot go on stops and says so."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from lakehouse.broker import ensure_topics, free_port
from lakehouse.errors import Fenced, Retryable, Terminal, UsageError
from lakehouse.lake import Lake, Run, history, open_lake
from lakehouse.services import Services
from lakehouse.settings import Settings
from tests.brokers import Broker
from tests.feed import rows
from writers.crm import ingest_crm
from writers.jobs import ingest
from writers.kafka import ingest as ingest_topic
from writers.kafka import received_by_kafka

RAW = "raw.product_events"
TOPIC = "product.events.test"


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return open_lake(Settings(home=tmp_path / "home", batch_rows=7), Run("test", "test"))


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
    return sum(b.rows for b in ingest_topic(lake, RAW, topic, broker.bootstrap_servers, received_by_kafka))


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


def test_a_missing_broker(lake: Lake) -> None:
    with pytest.raises(Retryable, match="no Kafka broker answers"):
        ingest_topic(lake, RAW, "t", f"127.0.0.1:{free_port()}", received_by_kafka)
    assert not lake.exists(RAW), "nothing half-written"


def test_only_sources_can_be_ingested(lake: Lake) -> None:
    with pytest.raises(UsageError, match=r"product\.events.*sources: raw\.stripe_events"):
        ingest(lake, Services("127.0.0.1:1", "t", "s", "sqlite://"), ["product.events"])


CRM = """
CREATE TABLE workspaces (
    workspace_id TEXT PRIMARY KEY, stripe_customer_id TEXT, effective_at TEXT, updated_at TEXT, deleted INTEGER
)
"""


@pytest.fixture
def crm(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with sqlite3.connect(tmp_path / "crm.db", isolation_level=None) as connection:
        connection.execute(CRM)
        yield connection


def poll(lake: Lake, tmp_path: Path, day: int) -> int:
    return ingest_crm(lake, f"sqlite:///{tmp_path}/crm.db", datetime(2026, 1, day, tzinfo=UTC)).rows


def test_every_version_of_a_crm_row_is_kept_and_deletions_are_noticed(
    lake: Lake, crm: sqlite3.Connection, tmp_path: Path
) -> None:
    put = "INSERT OR REPLACE INTO workspaces VALUES (?, ?, ?, ?, 0)"
    crm.execute(put, ("ws_1", "cus_1", "2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"))
    crm.execute(put, ("ws_2", None, "2026-01-01T00:00:00+02:00", "2026-01-01T00:00:01Z"))
    assert poll(lake, tmp_path, 2) == 2
    assert poll(lake, tmp_path, 3) == 0
    crm.execute(put, ("ws_1", "cus_2", "2026-01-03T00:00:00Z", "2026-01-03T12:00:00Z"))
    crm.execute("DELETE FROM workspaces WHERE workspace_id = 'ws_2'")
    assert poll(lake, tmp_path, 4) == 2
    assert poll(lake, tmp_path, 5) == 0
    found = rows(lake, 'SELECT "offset", workspace_id, customer_id, deleted FROM raw.crm_workspaces ORDER BY "offset"')
    assert [tuple(r.values()) for r in found[:2]] == [(0, "ws_1", "cus_1", False), (1, "ws_2", None, False)]
    assert sorted(tuple(r.values())[1:] for r in found[2:]) == [("ws_1", "cus_2", False), ("ws_2", None, True)]


def test_a_crm_that_is_wrong_or_away(lake: Lake, crm: sqlite3.Connection, tmp_path: Path) -> None:
    crm.execute("INSERT INTO workspaces VALUES ('ws', 'cus', '2026-01-01T00:00:00', '2026-01-01T00:00:00Z', 0)")
    with pytest.raises(Terminal, match=r"workspaces\.effective_at.*without a zone"):
        poll(lake, tmp_path, 2)
    with pytest.raises(Terminal, match="no table 'workspaces'"):
        ingest_crm(lake, f"sqlite:///{tmp_path}/empty.db")
    with pytest.raises(Retryable, match="does not answer"):
        ingest_crm(lake, f"sqlite:///{tmp_path}/no/such/folder/crm.db")
    assert not lake.exists("raw.crm_workspaces") or not lake.load("raw.crm_workspaces").metadata.snapshots
