"""Writers that follow a topic, any number at once: who joins, leaves, stops or wakes too late loses and doubles nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.cimpl import NewPartitions
from prometheus_client import REGISTRY

from lakehouse.broker import admin_client, ensure_topics
from lakehouse.errors import Terminal, UsageError
from lakehouse.lake import Lake, Run, history, open_lake
from lakehouse.local.kafka import KafkaBroker
from lakehouse.processes import free_port
from lakehouse.rollback import rollback_table
from lakehouse.settings import Settings
from tests.brokers import Broker
from tests.cli.command import finish, start
from tests.feed import rows
from writers import topics
from writers.kafka import Batch, Stream, follow
from writers.positions import set_by_hand, standings
from writers.records import received_by_kafka

RAW = "raw.product_events"
PARTITIONS = 6
OPTIONS = {"ingest_rows": 500, "ingest_seconds": 0.3, "ingest_session_seconds": 6, "ingest_refresh_seconds": 1}


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return open_lake(Settings(home=tmp_path / "home", **OPTIONS), Run("test", "test"))


@pytest.fixture
def topic(broker: Broker, request: pytest.FixtureRequest) -> str:
    name = f"follow.{request.node.name.partition('[')[0]}"
    ensure_topics(broker.bootstrap_servers, {name: PARTITIONS})
    return name


class Feed:
    """Produces numbered records to all partitions in turn."""

    def __init__(self, broker: Broker, topic: str) -> None:
        self.topic, self.sent = topic, 0
        self.producer = Producer({"bootstrap.servers": broker.bootstrap_servers, "acks": "all", "linger.ms": 5})

    def send(self, count: int, partitions: int = PARTITIONS) -> None:
        for number in range(self.sent, self.sent + count):
            self.producer.produce(self.topic, b"%d" % number, partition=number % partitions)
        assert self.producer.flush(10) == 0
        self.sent += count


@pytest.fixture
def feed(broker: Broker, topic: str) -> Feed:
    return Feed(broker, topic)


class Member:
    """A writer in a thread, with a lake of its own."""

    def __init__(self, settings: Settings, broker: Broker, topic: str, name: str = "member") -> None:
        self.stop, self.batches, self.failure = threading.Event(), list[Batch](), list[BaseException]()
        lake = open_lake(settings, Run(name, "test"))
        stream = Stream(RAW, topic, broker.bootstrap_servers, received_by_kafka)

        def work() -> None:
            try:
                follow(lake, stream, self.stop, self.batches.append)
            except BaseException as failure:
                self.failure.append(failure)

        self.thread = threading.Thread(target=work)
        self.thread.start()

    @property
    def rows(self) -> int:
        return sum(b.rows for b in self.batches)

    def end(self) -> None:
        self.stop.set()
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextmanager
def member(lake: Lake, broker: Broker, topic: str) -> Iterator[Member]:
    running = Member(lake.settings, broker, topic)
    try:
        yield running
    finally:
        running.end()


@contextmanager
def writer(tmp_path: Path, broker: Broker, topic: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`lakehouse ingest --follow` as a process of its own."""
    settings = {f"LAKEHOUSE_{name.upper()}": str(value) for name, value in OPTIONS.items()}
    services = {"LAKEHOUSE_KAFKA_BOOTSTRAP": broker.bootstrap_servers, "LAKEHOUSE_PRODUCT_TOPIC": topic}
    process = start(tmp_path / "home", "ingest", "--follow", RAW, "--json", **(settings | services | environment))
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> str:
    """SIGTERM; what it printed."""
    process.send_signal(signal.SIGTERM)
    return finish(process, 60).fine().out


def until(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def in_hand(port: int) -> bool:
    """Whether the writer that serves its metrics there has read records that it has not committed, of every partition."""
    try:
        found = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    except httpx.HTTPError:
        return False
    lags = [line for line in found.splitlines() if line.startswith(("lakehouse_lag_seconds{", "lakehouse_lag_records{"))]
    return len(lags) == 2 * PARTITIONS and all(float(line.rpartition(" ")[2]) > 0 for line in lags)


def stored(lake: Lake) -> int:
    return sum(lake.vector(RAW).values()) if lake.exists(RAW) else 0


def everything_once(lake: Lake, sent: int) -> None:
    found = rows(lake, f"SELECT payload FROM {RAW}")
    assert sorted(int(r["payload"]) for r in found) == list(range(sent))


def test_members_that_join_and_leave(lake: Lake, broker: Broker, topic: str, feed: Feed) -> None:
    feed.send(600)
    with member(lake, broker, topic) as first:
        until(lambda: first.rows > 0)
        with member(lake, broker, topic) as second:
            until(lambda: (feed.send(60), second.rows > 0)[1])
        feed.send(300)
        until(lambda: stored(lake) == feed.sent)
    everything_once(lake, feed.sent)
    assert not first.failure
    assert not second.failure
    assert first.rows + second.rows == feed.sent


def test_a_writer_that_wakes_too_late_does_no_harm(lake: Lake, broker: Broker, topic: str, feed: Feed, tmp_path: Path) -> None:
    """SIGSTOP with a batch in hand, until the group has given its partitions to another; then SIGCONT."""
    feed.send(300)
    with writer(tmp_path, broker, topic, LAKEHOUSE_INGEST_SECONDS="2", LAKEHOUSE_INGEST_ROWS="100000") as zombie:
        until(lambda: stored(lake) == 300)
        feed.send(600)
        time.sleep(0.5)  # it holds them now, and is not to commit them for another second
        zombie.send_signal(signal.SIGSTOP)
        assert stored(lake) == 300
        with member(lake, broker, topic) as successor:
            until(lambda: stored(lake) == feed.sent)
            zombie.send_signal(signal.SIGCONT)
            feed.send(120)
            until(lambda: stored(lake) == feed.sent)
            ended(zombie)
        assert successor.rows >= 600
    everything_once(lake, feed.sent)


def test_sigterm_commits_what_was_read_and_leaves(lake: Lake, broker: Broker, topic: str, feed: Feed, tmp_path: Path) -> None:
    """It would have waited a minute for more; the group needs not wait for its session to end."""
    slow = {"LAKEHOUSE_INGEST_SECONDS": "60", "LAKEHOUSE_INGEST_ROWS": "100000"}
    metrics_file, port = tmp_path / "metrics.prom", free_port()
    told = {"LAKEHOUSE_METRICS_FILE": str(metrics_file), "LAKEHOUSE_METRICS_PORT": str(port)}
    with writer(tmp_path, broker, topic, **told, **slow) as process:
        feed.send(200)
        until(lambda: in_hand(port))
        time.sleep(0.5)
        assert stored(lake) == 0
        batches = [json.loads(line) for line in ended(process).splitlines()]
    assert stored(lake) == 200
    assert [(b["table"], b["rows"]) for b in batches] == [(RAW, 200)]
    assert f'lakehouse_rows_total{{table="{RAW}"}} 200.0' in metrics_file.read_text()
    began = time.monotonic()
    with member(lake, broker, topic) as next_one:
        feed.send(60)
        until(lambda: next_one.rows == 60)
    assert time.monotonic() - began < OPTIONS["ingest_session_seconds"]
    everything_once(lake, feed.sent)


def test_partitions_added_while_it_runs_are_read_from_their_beginning(kafka: KafkaBroker, lake: Lake) -> None:
    """On Apache Kafka alone: the embedded broker cannot add any."""
    topic = "follow.grows"
    ensure_topics(kafka.bootstrap_servers, {topic: 2})
    feed = Feed(kafka, topic)
    feed.send(10, partitions=2)
    with member(lake, kafka, topic):
        until(lambda: stored(lake) == 10)
        admin = admin_client(kafka.bootstrap_servers)
        admin.create_partitions([NewPartitions(topic, 4)])[topic].result(10)
        # asked through the producer, because it is its own knowledge that lags
        until(lambda: len(feed.producer.list_topics(topic, timeout=5).topics[topic].partitions) == 4)
        feed.send(40, partitions=4)
        until(lambda: stored(lake) == 50)
    everything_once(lake, 50)
    assert set(lake.vector(RAW)) == {(topic, p) for p in range(4)}


def test_records_that_kafka_has_deleted_stop_it(kafka: KafkaBroker, lake: Lake) -> None:
    """A position that is gone: it says so, changes nothing, and goes on when a person has set the position."""
    topic = "follow.gone"
    ensure_topics(kafka.bootstrap_servers, {topic: 1})
    feed = Feed(kafka, topic)
    feed.send(10, partitions=1)
    with member(lake, kafka, topic):
        until(lambda: stored(lake) == 10)
    feed.send(10, partitions=1)
    admin = admin_client(kafka.bootstrap_servers)
    (deleted,) = admin.delete_records([TopicPartition(topic, 0, 15)]).values()
    deleted.result(10)
    stopped = Member(lake.settings, kafka, topic)
    stopped.thread.join(60)
    assert isinstance(stopped.failure[0], Terminal)
    assert "Kafka no longer has the offset" in str(stopped.failure[0])
    assert "lakehouse positions show raw.product_events" in str(stopped.failure[0])
    assert stored(lake) == 10

    (standing,) = standings(lake, RAW, topic, kafka.bootstrap_servers)
    assert (standing.next_offset, standing.first, standing.end, standing.lag) == (10, 15, 20, 5)
    assert standing.state == "5 records are gone from Kafka"
    set_by_hand(lake, RAW, topic, kafka.bootstrap_servers, [0], "earliest", "retention was too short")
    with member(lake, kafka, topic):
        until(lambda: stored(lake) == 20)
    found = rows(lake, f"SELECT payload FROM {RAW}")
    assert sorted(int(r["payload"]) for r in found) == [*range(10), *range(15, 20)]


def test_a_topic_created_again_while_it_is_read_stops_it(kafka: KafkaBroker, lake: Lake) -> None:
    """The new topic has more records than the position: they would pass for the old one's, but for its id.

    On Apache Kafka alone: when the embedded broker deletes a topic under a member of a group, librdkafka 2.16.0 crashes.
    """
    broker, topic = kafka, "follow.again"
    ensure_topics(broker.bootstrap_servers, {topic: PARTITIONS})
    feed = Feed(broker, topic)
    running = Member(lake.settings, broker, topic)
    feed.send(60)
    until(lambda: stored(lake) == 60)
    admin = admin_client(broker.bootstrap_servers)
    admin.delete_topics([topic])[topic].result(10)
    until(lambda: topic not in admin.list_topics(timeout=5).topics)
    ensure_topics(broker.bootstrap_servers, {topic: PARTITIONS})
    Feed(broker, topic).send(600)
    running.thread.join(60)
    assert isinstance(running.failure[0], Terminal), running.failure
    assert stored(lake) == 60
    everything_once(lake, 60)


def test_positions_set_by_hand(lake: Lake, broker: Broker, topic: str, feed: Feed) -> None:
    feed.send(12)
    with member(lake, broker, topic):
        until(lambda: stored(lake) == 12)
    there = broker.bootstrap_servers
    with pytest.raises(UsageError, match=r"2 rows of .*\[0\] from offset 0 on are stored and would be there twice.*--again"):
        set_by_hand(lake, RAW, topic, there, [0], 0, "look")
    with pytest.raises(UsageError, match=r"no partition 9; it has 0 to 5"):
        set_by_hand(lake, RAW, topic, there, [9], 0, "look")
    feed.send(PARTITIONS * 3)
    with pytest.raises(UsageError, match=r"\[1\]: Kafka still has 1 records from offset 2 on that would never be read.*--skip"):
        set_by_hand(lake, RAW, topic, there, [1], 3, "look")
    assert stored(lake) == 12
    set_by_hand(lake, RAW, topic, there, [1], 3, "a poison pill", skip=True)
    set_by_hand(lake, RAW, topic, there, [0], 1, "read it again", again=True)
    summary = history(lake.load(RAW))[0].summary
    assert summary is not None
    assert summary["lakehouse.kind"] == "positions set"
    assert summary["lakehouse.why"] == "read it again"
    assert "@" in (summary["lakehouse.who"] or "")
    with member(lake, broker, topic):
        until(lambda: stored(lake) == feed.sent)
    found = sorted(int(r["payload"]) for r in rows(lake, f"SELECT payload FROM {RAW}"))
    assert found == sorted([*(n for n in range(feed.sent) if n != 13), 6])


def test_metrics_tell_what_happened(lake: Lake, broker: Broker, topic: str, feed: Feed) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, {"table": RAW, **labels}) or 0.0

    before = {n: value(f"lakehouse_{n}_total") for n in ("rows", "bytes", "commits", "fenced")}
    feed.send(900)
    with member(lake, broker, topic) as running:
        until(lambda: stored(lake) == 900)
        lags = [{"table": RAW, "partition": str(p)} for p in range(PARTITIONS)]
        until(lambda: [REGISTRY.get_sample_value("lakehouse_lag_records", lag) for lag in lags] == [0.0] * PARTITIONS)
        assert 0 <= value("lakehouse_seconds_since_last_commit") < 30
    done = {n: value(f"lakehouse_{n}_total") - was for n, was in before.items()}
    assert done["rows"] == 900
    assert done["bytes"] == sum(len(b"%d" % n) for n in range(900))
    assert done["commits"] == len(running.batches) == len(history(lake.load(RAW)))
    assert value("lakehouse_batch_seconds_count", stage="commit") >= done["commits"]
    for name in ("commit_conflicts_total", "commit_unknown_outcomes_total", "dead_letters_total", "orphan_bytes"):
        assert REGISTRY.get_sample_value(f"lakehouse_{name}", {"table": RAW}) is not None, name


def test_a_broker_that_is_away_is_waited_for_and_counted(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topics, "TIMEOUT_SECONDS", 0.3)
    stop, stream = threading.Event(), Stream(RAW, "t", f"127.0.0.1:{free_port()}", received_by_kafka)
    restarts = ("lakehouse_writer_restarts_total", {"table": RAW})
    before = REGISTRY.get_sample_value(*restarts) or 0.0
    waiting = threading.Thread(target=follow, args=(lake, stream, stop))
    waiting.start()
    until(lambda: (REGISTRY.get_sample_value(*restarts) or 0.0) > before)
    stop.set()
    waiting.join(60)
    assert not waiting.is_alive()


def test_a_table_that_was_rolled_back_under_a_running_writer_is_filled_again(
    lake: Lake, broker: Broker, topic: str, feed: Feed
) -> None:
    feed.send(120)
    with member(lake, broker, topic) as running:
        until(lambda: stored(lake) == 120)
        first = history(lake.load(RAW))[-1].snapshot_id
        feed.send(120)
        until(lambda: stored(lake) == 240)
        rollback_table(lake, RAW, first)
        until(lambda: stored(lake) == 240)  # nothing new comes that would tell it
        feed.send(60)
        until(lambda: stored(lake) == 300)
    assert not running.failure
    everything_once(lake, 300)


def test_positions_set_beside_a_running_writer(lake: Lake, broker: Broker, topic: str, feed: Feed) -> None:
    """Of a partition that gets no new records, too; its rows are there twice, as was asked for."""
    feed.send(12)
    with member(lake, broker, topic) as running:
        until(lambda: stored(lake) == 12)
        set_by_hand(lake, RAW, topic, broker.bootstrap_servers, [0], 1, "read it again", again=True)
        assert stored(lake) == 11
        until(lambda: stored(lake) == 12)
    assert not running.failure
    found = sorted(int(r["payload"]) for r in rows(lake, f"SELECT payload FROM {RAW}"))
    assert found == sorted([*range(12), 6])
