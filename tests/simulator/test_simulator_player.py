"""The player over real HTTP and SQLite; Kafka is replaced by a list."""

import json
import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import stripe
from confluent_kafka import KafkaError

from simulator import webhooks
from simulator.player import BURST_SECONDS, JournalMismatchError, Player, ProduceError
from simulator.webhooks import DeliveryError, WebhookSender, signature
from simulator.world import WorldConfig, build_world

SECRET = "whsec_test"
SMALL = WorldConfig(seed=5, customers=100, days=5, product_events=1_000)


class Receiver(ThreadingHTTPServer):
    """Takes webhooks as a receiver would: the signature is checked against the clock."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.clock = 0.0
        self.taken: list[tuple[float, str]] = []
        self.connections = 0
        self.answers: list[int] = []  # what to answer first, before 200
        self.lock = threading.Lock()

    def set_clock(self, at: float) -> None:
        assert at >= self.clock
        self.clock = at

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/webhooks/stripe"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Receiver

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        header = self.headers["Stripe-Signature"]
        with self.server.lock:
            status = self.server.answers.pop(0) if self.server.answers else 200
            if status == 200:
                assert f"t={int(self.server.clock)}," in header
                stripe.WebhookSignature.verify_header(body.decode(), header, SECRET, tolerance=None)
                self.server.taken.append((self.server.clock, json.loads(body)["id"]))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Topic:
    """A producer that keeps what it gets; `full` raises BufferError once."""

    def __init__(self) -> None:
        self.records: list[tuple[int, bytes, bytes]] = []
        self.full = True
        self.lost = 0

    def produce(self, topic, value, key, timestamp, headers) -> None:
        if self.full:
            self.full = False
            raise BufferError
        assert topic == "product.events"
        self.records.append((timestamp, key, value))

    def poll(self, _timeout: float) -> int:
        return 0

    def flush(self, _timeout: float) -> int:
        return self.lost


@pytest.fixture(scope="module")
def small():
    return build_world(SMALL)


@pytest.fixture
def receiver():
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def make_player(world, folder, receiver, topic, **more) -> Player:
    return Player(
        world, folder, webhook_url=receiver.url, webhook_secret=SECRET, bootstrap_servers="nowhere:1",
        product_topic="product.events", set_clock=receiver.set_clock, producer=topic, **more,
    )  # fmt: skip


def test_all_rounds_together_send_the_world_once(small, receiver, tmp_path):
    topic, told = Topic(), []
    with make_player(small, tmp_path, receiver, topic, progress=lambda *step: told.append(step)) as player:
        rounds = player.rounds(4)
        assert rounds[0].start == small.start
        assert rounds[-1].end == small.end
        reports = []
        for each in rounds:
            reports.append(player.deliver(each))
            player.confirm(each)
        assert player.pending(4) == []
    assert sorted(e for _, e in receiver.taken) == sorted(d.event_id for d in small.stripe_deliveries)
    assert receiver.connections <= 8
    assert sum(r.posted for r in reports) == sum(r.accepted for r in reports) == len(small.stripe_deliveries)
    assert sum(r.crm_changes for r in reports) == len(small.crm_changes) + len(small.membership_changes)
    assert sum(r.produced for r in reports) == len(topic.records) == len(small.product_records)
    assert [r[0] for r in topic.records] == small.product_records.received_at.to_list()
    assert {what for what, _, _ in told} == {"stripe", "crm", "product"}


def test_webhooks_arrive_at_most_a_burst_after_their_time_and_never_before(small, receiver, tmp_path):
    with make_player(small, tmp_path, receiver, Topic()) as player:
        player.deliver(player.rounds(10)[0])
    due = {}
    for delivery in small.stripe_deliveries:
        due.setdefault(delivery.event_id, []).append(delivery.deliver_at)
    for clock, event_id in receiver.taken:
        assert any(0 <= clock - at < BURST_SECONDS for at in due[event_id])


def test_the_crm_holds_the_present_state_only(world, receiver, tmp_path):
    with make_player(world, tmp_path, receiver, Topic()) as player:
        written = sum(player._write_crm(each) for each in player.rounds(10))
    last = {(change.workspace_id, change.mapping_id): change for change in world.crm_changes}
    assert written == len(world.crm_changes) + len(world.membership_changes)
    assert len(world.crm_changes) > len(last)
    with sqlite3.connect(tmp_path / "crm.db") as crm:
        rows = crm.execute(
            "SELECT workspace_id, mapping_id, stripe_customer_id, effective_at, updated_at, deleted FROM workspaces"
        ).fetchall()
    assert {row[:2]: row[2:] for row in rows} == {
        w: (c.stripe_customer_id, c.effective_at.isoformat(), c.visible_at.isoformat(), int(c.deleted)) for w, c in last.items()
    }
    assert all(row[4].endswith("+00:00") for row in rows)
    holding = {(c.user_id, c.workspace_id): c for c in world.membership_changes}
    with sqlite3.connect(tmp_path / "crm.db") as crm:
        found = crm.execute("SELECT user_id, workspace_id, role, updated_at, deleted FROM memberships").fetchall()
    assert {row[:2]: row[2:] for row in found} == {
        key: (c.role, c.visible_at.isoformat(), int(c.deleted)) for key, c in holding.items()
    }


def test_a_new_player_goes_on_behind_the_last_confirmed_round(small, receiver, tmp_path):
    with make_player(small, tmp_path, receiver, Topic()) as player:
        first, second = player.pending(3)[:2]
        player.deliver(first)
        player.confirm(first)
        player.deliver(second)  # and the lake dies before it is confirmed
    again = make_player(small, tmp_path, receiver, Topic())
    assert [r.number for r in again.pending(3)] == [1, 2]
    assert again.pending(3)[0] == second
    with pytest.raises(ValueError, match="before round 1"):
        again.confirm(again.rounds(3)[2])
    again.confirm(first)  # once more is no error
    with pytest.raises(JournalMismatchError, match="in 3 rounds, not 4"):
        again.pending(4)


def test_a_folder_belongs_to_one_world(small, receiver, tmp_path):
    make_player(small, tmp_path, receiver, Topic())
    other = build_world(WorldConfig(seed=6, customers=100, days=20, product_events=1_000))
    with pytest.raises(JournalMismatchError, match=r"days, seed.*make clean"):
        make_player(other, tmp_path, receiver, Topic())


def test_a_record_that_kafka_did_not_take_stops_the_round(small, receiver, tmp_path, monkeypatch):
    monkeypatch.setattr("simulator.player.FLUSH_SECONDS", 0.1)  # this topic never answers for what it lost
    topic = Topic()
    topic.lost = 3
    with make_player(small, tmp_path, receiver, topic) as player, pytest.raises(ProduceError, match="3 of"):
        player.deliver(player.rounds(5)[0])
    receiver.clock = 0.0  # the round is not confirmed, so it is sent again, at its own times
    with make_player(small, tmp_path, receiver, Topic()) as player:
        player._not_delivered(KafkaError(KafkaError._MSG_TIMED_OUT), None)
        with pytest.raises(ProduceError, match="timed out"):
            player.deliver(player.rounds(5)[0])


def test_unavailable_is_tried_again_and_counted(receiver):
    receiver.answers = [503, 500, 429]
    with WebhookSender(receiver.url, SECRET, connections=1) as sender:
        receiver.clock = 1_000.0
        sent = sender.post([("evt_a", b'{"id":"evt_a"}'), ("evt_b", b'{"id":"evt_b"}')], 1_000)
    assert (sent.attempts, sent.accepted) == (5, 2)
    assert sorted(e for _, e in receiver.taken) == ["evt_a", "evt_b"]


def test_a_refusal_and_a_dead_receiver_are_errors_that_name_the_event(receiver, monkeypatch):
    monkeypatch.setattr(webhooks, "FIRST_PAUSE_SECONDS", 0.001)
    receiver.answers = [400]
    with WebhookSender(receiver.url, SECRET) as sender, pytest.raises(DeliveryError, match="evt_a was refused with HTTP 400"):
        sender.post([("evt_a", b"{}")], 1)
    receiver.answers = [503] * webhooks.ATTEMPTS
    with WebhookSender(receiver.url, SECRET) as sender, pytest.raises(DeliveryError, match=r"evt_b.*HTTP 503"):
        sender.post([("evt_b", b"{}")], 1)
    assert receiver.taken == []
    with WebhookSender("http://127.0.0.1:9", SECRET) as sender, pytest.raises(DeliveryError, match="ConnectionRefused"):
        sender.post([("evt_c", b"{}")], 1)


def test_only_http_is_spoken():
    with pytest.raises(ValueError, match="http"):
        WebhookSender("https://example.test/hook", SECRET)


def test_signatures_are_stripes():
    body = '{"id":"evt_x"}'
    expected = stripe.WebhookSignature._compute_signature(f"12.{body}", SECRET)
    assert signature(SECRET, 12, body.encode()) == f"t=12,v1={expected}"
