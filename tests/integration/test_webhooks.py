"""The receiver for real: uvicorn on a socket, the embedded broker behind it, records read back from the topic."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, Consumer, Message, Producer, TopicPartition
from pydantic import SecretStr

from benchmarks.webhooks import one_run
from lakehouse.broker import EmbeddedBroker, ensure_topics
from lakehouse.errors import UsageError
from lakehouse.processes import free_port
from tests.brokers import Broker
from writers.webhook_metrics import OUTCOMES, REASONS, REFUSALS
from writers.webhook_records import KafkaProduce
from writers.webhook_server import MAX_CONNECTIONS, ReceiverServer
from writers.webhooks import create_app

TOPIC = "stripe.webhooks"
SECRETS = [SecretStr("whsec_new"), SecretStr("whsec_old")]
NOW = 1_700_000_000.25
LIMIT = 200_000
BODY = b'{ "id": "evt_1",\n  "account": "acct_1", "data": {"object": {"id": "sub_1"}}, "card": "4242424242424242" }'


def signature(body: bytes, secret: str = "whsec_new", at: int = int(NOW)) -> dict[str, str]:
    v1 = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return {"Stripe-Signature": f"t={at},v1={v1}"}


@dataclass
class Receiver:
    """A running receiver and its broker, seen from outside."""

    broker: Broker
    url: str
    client: httpx.Client

    def post(self, body: bytes = BODY, headers: dict[str, str] | None = None) -> httpx.Response:
        return self.client.post("/webhooks/stripe", content=body, headers=signature(body) if headers is None else headers)

    def count(self, outcome: str) -> int:
        found = re.search(rf'requests_total{{outcome="{outcome}"}} (\d+)\.0', self.client.get("/metrics").text)
        assert found
        return int(found[1])

    def records(self) -> list[Message]:
        return read_all(self.broker.bootstrap_servers)


def read_all(bootstrap: str) -> list[Message]:
    """Every record of the topic up to now: a mark is produced and read up to (this broker's watermarks are wrong)."""
    mark = b"mark:" + uuid.uuid4().bytes
    producer = Producer({"bootstrap.servers": bootstrap, "log_level": 0})
    producer.produce(TOPIC, mark)
    assert producer.flush(10) == 0
    reader = Consumer({"bootstrap.servers": bootstrap, "group.id": "t", "auto.offset.reset": "error", "log_level": 0})
    reader.assign([TopicPartition(TOPIC, 0, 0)])
    found: list[Message] = []
    while not found or found[-1].value() != mark:
        batch = reader.consume(1, timeout=10)
        assert batch, "the mark was not read"
        found += batch
    reader.close()
    return [r for r in found if not (r.value() or b"").startswith(b"mark:")]


@contextlib.contextmanager
def receiver(broker: Broker, delivery_timeout: float = 10.0, read_timeout: float = 10.0) -> Iterator[Receiver]:
    ensure_topics(broker.bootstrap_servers, {TOPIC: 1})
    with KafkaProduce(broker.bootstrap_servers, TOPIC, delivery_timeout_seconds=delivery_timeout) as produce:
        app = create_app(
            produce=produce,
            secrets=SECRETS,
            clock=lambda: NOW,
            max_body_bytes=LIMIT,
            read_timeout_seconds=read_timeout,
        )
        with ReceiverServer(app) as server, httpx.Client(base_url=server.url, timeout=20) as client:
            yield Receiver(broker, server.url, client)


@pytest.fixture(scope="module")
def running(broker: Broker) -> Iterator[Receiver]:
    with receiver(broker, read_timeout=1.0) as up:
        yield up


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Receiver]:
    """One whose broker the test may stop: an answer must come within two seconds."""
    with EmbeddedBroker(tmp_path, free_port()) as broker, receiver(broker, delivery_timeout=2.0) as up:
        assert up.post().status_code == 200
        yield up


def test_an_accepted_webhook_is_in_the_topic_byte_for_byte(running: Receiver) -> None:
    before = len(running.records())
    answer = running.post()
    assert (answer.status_code, answer.content) == (200, b"")
    record = running.records()[before]
    assert record.value() == BODY
    assert record.key() == b"acct_1:sub_1"
    assert record.timestamp() == (TIMESTAMP_CREATE_TIME, 1_700_000_000_250)
    assert record.headers() == [("received_at", b"2023-11-14T22:13:20.250000Z"), ("source", b"webhook")]


def test_repeated_and_concurrent_posts_are_all_kept(running: Receiver) -> None:
    """Stripe repeats itself; telling repeats apart is for later, where it can look back without limit."""
    before = len(running.records())
    bodies = [json.dumps({"id": f"evt_{i % 50}", "pad": "é" * i}, ensure_ascii=False).encode() for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert {answer.status_code for answer in pool.map(running.post, bodies)} == {200}
    assert sorted(r.value() or b"" for r in running.records()[before:]) == sorted(bodies)


def test_either_secret_is_accepted_while_one_is_rolled(running: Receiver) -> None:
    assert running.post(headers=signature(BODY, "whsec_old")).status_code == 200
    assert running.post(headers=signature(BODY, "whsec_retired")).status_code == 400


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "missing"),
        (signature(b"another body"), "mismatch"),
        (signature(BODY, at=int(NOW) - 301), "stale"),
        (signature(BODY, at=int(NOW) + 302), "future"),
        ({"Stripe-Signature": "t=1,v0=00"}, "no_v1"),
        ({"Stripe-Signature": "v1=00"}, "malformed"),
    ],
)
def test_a_bad_signature_is_400_and_reaches_no_topic(running: Receiver, headers: dict[str, str], reason: str) -> None:
    records, counted = len(running.records()), running.count("bad_signature")
    answer = running.post(headers=headers)
    assert (answer.status_code, answer.text) == (400, f"bad signature: {reason}\n")
    assert running.count("bad_signature") == counted + 1
    assert f'bad_signatures_total{{reason="{reason}"}} 0.0' not in running.client.get("/metrics").text
    assert len(running.records()) == records


def test_a_header_that_is_not_ascii_is_400(running: Receiver) -> None:
    answer = running.client.post(
        "/webhooks/stripe", content=BODY, headers=[(b"stripe-signature", f"t={int(NOW)},v1=\xe9".encode("latin-1"))]
    )
    assert answer.status_code == 400


@pytest.mark.parametrize("body", [b"", b"[]", b"nope", b'{"data":' + b"[" * 90_000 + b"]" * 90_000 + b"}"])
def test_signed_but_not_a_json_object_is_400(running: Receiver, body: bytes) -> None:
    records, counted = len(running.records()), running.count("not_json_object")
    assert running.post(body).status_code == 400
    assert running.count("not_json_object") == counted + 1
    assert len(running.records()) == records


def test_the_size_limit_is_exact(running: Receiver) -> None:
    def padded(size: int) -> bytes:
        return b'{"id":"evt_big","pad":"' + b"x" * (size - 25) + b'"}'

    assert len(padded(LIMIT)) == LIMIT
    counted = running.count("too_large")
    assert running.post(padded(LIMIT)).status_code == 200
    assert running.post(padded(LIMIT + 1)).status_code == 413
    for size, status in ((LIMIT, 200), (LIMIT + 1, 413)):  # an iterator is sent in chunks, without a length
        body = padded(size)
        chunks = iter([body[:1000], body[1000:]])
        assert running.client.post("/webhooks/stripe", content=chunks, headers=signature(body)).status_code == status
    assert running.count("too_large") == counted + 2


def test_too_large_is_answered_before_the_body_is_read(running: Receiver) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    head = f"POST /webhooks/stripe HTTP/1.1\r\nHost: {host}\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as declared:
        declared.sendall(f"{head}Content-Length: {LIMIT + 1}\r\n\r\n".encode())
        assert declared.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection((host, int(port)), timeout=5) as streamed:  # never ends, and no length is declared
        streamed.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(LIMIT // 50_000 + 1):
            streamed.sendall(b"c350\r\n" + b"x" * 50_000 + b"\r\n")
        assert streamed.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_arrive_is_408(running: Receiver) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as slow:
        slow.sendall(b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    assert running.count("read_timeout") == 1


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


@pytest.fixture(scope="module")
def hurried(running: Receiver) -> Iterator[Receiver]:
    """A receiver that gives a head half a second."""
    with KafkaProduce(running.broker.bootstrap_servers, TOPIC) as produce:
        app = create_app(produce=produce, secrets=SECRETS, clock=lambda: NOW)
        with ReceiverServer(app, head_seconds=0.5) as server, httpx.Client(base_url=server.url, timeout=20) as client:
            yield Receiver(running.broker, server.url, client)


def refused(up: Receiver, reason: str) -> int:
    found = re.search(rf'refused_connections_total{{reason="{reason}"}} (\d+)\.0', up.client.get("/metrics").text)
    assert found
    return int(found[1])


def test_a_head_that_trickles_in_is_408_and_an_idle_connection_is_closed(hurried: Receiver) -> None:
    counted = refused(hurried, "head_too_slow")
    with connect(hurried.url) as idle, connect(hurried.url) as slow:
        slow.sendall(b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\n")
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 4:  # a header line now and then keeps no connection open
                slow.sendall(b"X-Slow: 1\r\n")
                time.sleep(0.1)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
        assert idle.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < 3
    assert refused(hurried, "head_too_slow") == counted + 2


def test_the_second_head_of_a_connection_has_no_more_time(hurried: Receiver) -> None:
    with connect(hurried.url) as kept:
        kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert kept.recv(1000).endswith(b"ok\n")
        kept.sendall(b"POST /webhooks/stripe HTTP/1.1\r\n")
        assert kept.recv(100).startswith(b"HTTP/1.1 408")


def test_a_thousand_idle_connections_keep_stripe_out_only_until_they_are_closed(running: Receiver) -> None:
    with KafkaProduce(running.broker.bootstrap_servers, TOPIC) as produce, contextlib.ExitStack() as stack:
        app = create_app(produce=produce, secrets=SECRETS, clock=lambda: NOW)
        server = stack.enter_context(ReceiverServer(app, head_seconds=5.0))
        idle = [stack.enter_context(connect(server.url)) for _ in range(MAX_CONNECTIONS)]
        up = Receiver(running.broker, server.url, stack.enter_context(httpx.Client(base_url=server.url, timeout=20)))
        assert up.post().status_code == 503
        eventually(lambda: up.post().status_code == 200, seconds=30)
        assert all(one.recv(100).startswith(b"HTTP/1.1 408") for one in idle)
        assert refused(up, "head_too_slow") == MAX_CONNECTIONS
        assert refused(up, "over_capacity") >= 1


def test_what_follows_a_good_request_does_not_take_its_answer(running: Receiver) -> None:
    """The broker has the first by then; a 400 would be read as its answer."""
    body = b'{"id":"evt_followed"}'
    good = f"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n".encode()
    good += f"Stripe-Signature: {signature(body)['Stripe-Signature']}\r\n\r\n".encode() + body
    for more, answers in ((b"\0 nonsense\r\n\r\n", 1), (good + b"nonsense", 2), (good[:80] + b"\r\nX: " + b"x" * 70_000, 1)):
        with connect(running.url) as client:
            client.sendall(good + more)
            got = b""
            while part := client.recv(1000):
                got += part
            assert [got.count(b"HTTP/1.1 "), got.count(b"HTTP/1.1 200")] == [answers, answers], got


def test_a_head_without_end_is_431(running: Receiver) -> None:
    counted = refused(running, "head_too_large")
    endless = b"x" * 100_000
    for start in (
        b"POST /" + endless,
        b"GET /healthz HTTP/1.1\r\nX: " + endless,
        b"GET /healthz HTTP/1.1\r\n" + b"X: 1\r\n" * 10_000,
    ):
        with connect(running.url) as client:
            client.sendall(start)
            assert client.recv(100).startswith(b"HTTP/1.1 431")
    assert refused(running, "head_too_large") == counted + 3


def test_all_series_are_there_from_the_start(hurried: Receiver) -> None:
    told = hurried.client.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain; version=")
    series = {line.rpartition(" ")[0] for line in told.text.splitlines() if not line.startswith("#")}
    wanted = {f'stripe_webhook_requests_total{{outcome="{o}"}}' for o in OUTCOMES}
    wanted |= {f'stripe_webhook_bad_signatures_total{{reason="{r}"}}' for r in REASONS}
    wanted |= {f'stripe_webhook_refused_connections_total{{reason="{r}"}}' for r in REFUSALS}
    wanted |= {"stripe_webhook_produce_seconds_count", "stripe_webhook_accepted_bytes_total", "stripe_webhook_connections"}
    assert wanted <= series


def test_a_defect_of_ours_is_500_without_a_trace_and_is_counted(running: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        async def __call__(self, record: object) -> None:
            raise RuntimeError("4242424242424242")

        async def reachable(self) -> bool:
            return True

    with (
        ReceiverServer(create_app(produce=Broken(), secrets=SECRETS, clock=lambda: NOW)) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        up = Receiver(running.broker, server.url, client)
        answer = up.post()
        assert (answer.status_code, answer.text) == (500, "failed\n")
        assert up.count("failed") == 1
        assert up.client.get("/healthz").status_code == 200


def test_the_benchmark_runs() -> None:
    figures = one_run(0.01, lambda _: None)
    assert figures["not_durable"] == figures["refused"] == 0
    assert figures["requests"] > 100
    assert figures["p50_ms"] <= figures["p99_ms"]


def test_other_methods_and_paths(running: Receiver) -> None:
    for method in ("GET", "PUT", "DELETE"):
        answer = running.client.request(method, "/webhooks/stripe")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert running.count("wrong_method") == 3
    assert running.client.post("/healthz").status_code == 405
    assert running.client.post("/webhooks/other", content=BODY, headers=signature(BODY)).status_code == 404


def test_health_and_readiness(running: Receiver) -> None:
    assert running.client.get("/healthz").status_code == 200
    assert running.client.get("/readyz").status_code == 200


def test_not_ready_without_the_topic_and_asking_does_not_create_it(running: Receiver) -> None:
    with (
        KafkaProduce(running.broker.bootstrap_servers, "absent") as produce,
        ReceiverServer(create_app(produce=produce, secrets=SECRETS)) as server,
    ):
        assert [httpx.get(f"{server.url}/readyz").status_code for _ in range(2)] == [503, 503]


def test_503_while_the_broker_is_away_and_200_when_another_takes_over(fresh: Receiver) -> None:
    """The new broker knows nothing of our producer id: a fatal error for an idempotent producer, which is replaced."""
    fresh.broker.stop()
    answer = fresh.post()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert fresh.client.get("/readyz").status_code == 503
    assert fresh.client.get("/healthz").status_code == 200
    assert fresh.count("broker_unavailable") == 1

    fresh.broker.start()
    ensure_topics(fresh.broker.bootstrap_servers, {TOPIC: 1})
    body = b'{"id":"evt_after"}'
    eventually(lambda: fresh.post(body).status_code == 200)
    assert fresh.client.get("/readyz").status_code == 200
    assert {r.value() for r in fresh.records()} == {body}


def test_503_while_the_broker_hangs(fresh: Receiver) -> None:
    """It takes the record and says nothing: no report, no 2xx. What it does later is a repeat, which is allowed."""
    os.kill(fresh.broker.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert fresh.post(b'{"id":"evt_hung"}').status_code == 503
        assert time.monotonic() - started < 4
    finally:
        os.kill(fresh.broker.pid, signal.SIGCONT)
    eventually(lambda: fresh.post(b'{"id":"evt_hung"}').status_code == 200)
    assert b'{"id":"evt_hung"}' in {r.value() for r in fresh.records()}


def test_every_200_is_in_the_topic_when_the_receiver_stops_under_load(tmp_path: Path) -> None:
    answered: list[bytes] = []
    stopping = threading.Event()

    def send(worker: int, address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=10) as connection:
            for i in range(100_000):
                body = json.dumps({"id": f"evt_{worker}_{i}"}).encode()
                head = f"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
                head += f"Stripe-Signature: {signature(body)['Stripe-Signature']}\r\n\r\n"
                try:
                    connection.sendall(head.encode() + body)
                    status = connection.recv(1000)
                except OSError:
                    status = b""
                if status.startswith(b"HTTP/1.1 200"):
                    answered.append(body)
                else:
                    assert stopping.is_set(), status
                    return

    with EmbeddedBroker(tmp_path) as broker:
        with receiver(broker) as up:
            host, port = up.url.removeprefix("http://").split(":")
            threads = [threading.Thread(target=send, args=(n, (host, int(port)))) for n in range(4)]
            for thread in threads:
                thread.start()
            eventually(lambda: len(answered) > 300)
            stopping.set()
        for thread in threads:
            thread.join()
        kept = {r.value() for r in read_all(broker.bootstrap_servers)}
    assert set(answered) <= kept


def test_neither_payload_nor_secret_is_logged(fresh: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    fresh.post()
    fresh.post(headers={"Stripe-Signature": "t=1,v1=4242424242424242"})
    fresh.post(b'["4242424242424242"]')
    fresh.broker.stop()
    fresh.post()
    said = "\n".join(r.getMessage() + str(r.exc_info or "") for r in caplog.records if not r.name.startswith("http"))
    assert "bad signature" in said
    assert "20 bytes, correctly signed, are not a JSON object" in said
    assert "not accepted" in said
    for secret in ("4242", "whsec", "evt_1", "sub_1"):
        assert secret not in said


def test_a_taken_port_is_refused_by_name(running: Receiver) -> None:
    port = int(running.url.rpartition(":")[2])
    with KafkaProduce(running.broker.bootstrap_servers, TOPIC) as produce:
        app = create_app(produce=produce, secrets=SECRETS)
        with pytest.raises(UsageError, match=rf"{port}.*LAKEHOUSE_WEBHOOK_PORT"):
            ReceiverServer(app, port=port).start()


def eventually(check: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.1)
