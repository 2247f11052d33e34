"""`lakehouse up` and `ingest`: a webhook's way from a signed POST to its row, the services found and given up."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from command import Ran, brokers_of, finish, services_up, start, wait_for

from lakehouse.broker import EmbeddedBroker, ensure_topics

BODY = json.dumps(
    {
        "id": "evt_first",
        "object": "event",
        "type": "customer.created",
        "created": 1_750_000_000,
        "livemode": True,
        "api_version": "2025-01-27.acacia",
        "data": {"object": {"id": "cus_first", "object": "customer", "created": 1_750_000_000}},
    }
).encode()


def signature(secret: str, body: bytes) -> dict[str, str]:
    now = int(time.time())
    digest = hmac.new(secret.encode(), f"{now}.".encode() + body, hashlib.sha256).hexdigest()
    return {"stripe-signature": f"t={now},v1={digest}"}


def test_a_port_in_use_is_said_with_the_setting_to_change(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for command in ("up", "demo"):
            ran = finish(start(tmp_path / "home", command, LAKEHOUSE_WEBHOOK_PORT=port))
            ran.failed(2, f"127.0.0.1:{port}", "LAKEHOUSE_WEBHOOK_PORT")
    assert brokers_of(tmp_path / "home") == []
    assert not (tmp_path / "home" / "run" / "services.json").exists()


def test_a_webhook_from_post_to_row(call: Callable[..., Ran], tmp_path: Path) -> None:
    """`up` in one process, everything else from others; then SIGTERM, after which no trace of the services is left."""
    home = tmp_path / "home"
    with services_up(home, "--show-secret") as (process, told):
        assert len(brokers_of(home)) == 1
        assert process.stdout is not None
        lines = {}
        while "Ctrl-C" not in (line := process.stdout.readline()):
            lines[line.split()[0]] = line.split()[1]
        assert lines["webhooks"] == told["webhook_url"]
        assert lines["Kafka"] == told["bootstrap"]
        assert (home / "run" / "services.json").read_text().find(lines["secret"]) == -1

        url = lines["webhooks"]
        assert httpx.post(url, content=BODY).status_code == 400
        assert httpx.post(url, content=BODY, headers=signature("whsec_other", BODY)).status_code == 400
        assert httpx.post(url, content=BODY, headers=signature(lines["secret"], BODY)).is_success

        ran = finish(start(home, "ingest", "--json"))
        rows = {b["table"]: b["rows"] for b in ran.fine().json if b["rows"]}
        assert rows == {"raw.stripe_events": 1}
        assert "no CRM yet" in ran.err
        found = call("sql", "SELECT event_id, source FROM raw.stripe_events", "--json").fine().json
        assert found == [{"event_id": "evt_first", "source": "webhook"}]
        again = call("ingest").fine()
        assert "Nothing was new" in again.out

        call("up").failed(2, "already run", f"process {process.pid}")
        call("demo").failed(2, "already run", f"process {process.pid}")
        call("clean", "--yes").failed(2, f"process {process.pid}", "stop them first")
        call("ingest", "product.events").failed(2, "no writer fills 'product.events'", "raw.product_events")

        process.send_signal(signal.SIGTERM)
        assert finish(process, 20).fine().err == ""
    assert brokers_of(home) == []
    assert not (home / "run" / "services.json").exists()
    call("ingest").failed(2, "no Kafka broker")
    call("clean", "--yes").fine()


@pytest.mark.parametrize("secrets", ['["whsec_mine"]', "[]"])
def test_ctrl_c_ends_it_well(call: Callable[..., Ran], tmp_path: Path, secrets: str) -> None:
    """It starts over the remains of one that was killed: even if its process id is in use again."""
    home = tmp_path / "home"
    (home / "run").mkdir(parents=True)
    dead = {"bootstrap": "127.0.0.1:1", "product_topic": "p", "stripe_topic": "s", "crm_url": "", "pid": os.getpid()}
    (home / "run" / "services.json").write_text(json.dumps(dead))
    call("ingest").failed(2, "no Kafka broker", "lakehouse up")
    process = start(home, "up", LAKEHOUSE_WEBHOOK_SECRETS=secrets)
    wait_for(lambda: f'"pid": {process.pid}}}' in (home / "run" / "services.json").read_text(), process)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    ran = finish(process, 20).fine()
    assert "secret" not in ran.out
    assert "whsec" not in ran.out
    assert not (home / "run" / "services.json").exists()
    assert brokers_of(home) == []


def test_sigterm_answers_what_is_under_way_and_ends_well(tmp_path: Path) -> None:
    """As an orchestrator stops it: no new connection, an answer to each request that it has begun, exit code 0."""
    with EmbeddedBroker(tmp_path) as broker:
        ensure_topics(broker.bootstrap_servers, {"stripe.webhooks": 1})
        process = start(
            tmp_path / "home",
            "up",
            LAKEHOUSE_KAFKA_BOOTSTRAP=broker.bootstrap_servers,
            LAKEHOUSE_WEBHOOK_SECRETS='["whsec_mine"]',
        )
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[1].removeprefix("http://").partition("/")[0]
            host, port = address.split(":")
            clients = [socket.create_connection((host, int(port)), timeout=20) for _ in range(20)]
            os.kill(broker.pid, signal.SIGSTOP)
            for client in clients:
                head = f"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n"
                client.sendall(
                    f"{head}Stripe-Signature: {signature('whsec_mine', BODY)['stripe-signature']}\r\n\r\n".encode() + BODY
                )
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: not accepts(host, int(port)), process)
            os.kill(broker.pid, signal.SIGCONT)
            assert {client.recv(1000).split(b"\r\n")[0] for client in clients} == {b"HTTP/1.1 200 OK"}
            assert finish(process, 20).fine().err == ""
        finally:
            os.kill(broker.pid, signal.SIGCONT)
            process.kill()


def accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True
