"""Apache Kafka that asks who is there: the settings reach every client, and a wrong password is said as such."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient
from pydantic import SecretStr

from lakehouse.broker import ensure_topics
from lakehouse.errors import Retryable, Terminal
from lakehouse.lake import open_lake
from lakehouse.local.kafka import KafkaBroker, why_unavailable
from lakehouse.processes import HOST, free_ports
from lakehouse.services import Services, kafka_config
from lakehouse.settings import Settings
from simulator.webhooks import signature
from tests.feed import rows
from tests.reconciling import DAY, NOW, bench, customer, event
from writers import jobs, topics
from writers.kafka import ingest
from writers.records import received_by_kafka
from writers.session import Stream

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())
PASSWORD = "correct horse"


class GuardedKafka(KafkaBroker):
    """A node with a second listener, which wants a user and a password."""

    guarded = ""

    def _write_properties(self) -> Path:
        path = super()._write_properties()
        (port,) = free_ports(1)
        self.guarded = f"{HOST}:{port}"
        more = {
            "listeners": f",GUARDED://{self.guarded}",
            "advertised.listeners": f",GUARDED://{self.guarded}",
            "listener.security.protocol.map": ",GUARDED:SASL_PLAINTEXT",
        }
        lines = [line + more.get(line.partition("=")[0], "") for line in path.read_text().splitlines()]
        login = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_lake="{PASSWORD}";'
        lines += ["sasl.enabled.mechanisms=PLAIN", f"listener.name.guarded.plain.sasl.jaas.config={login}"]
        path.write_text("\n".join(lines) + "\n")
        return path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with GuardedKafka(tmp_path_factory.mktemp("guarded")) as node:
        ensure_topics(node.bootstrap_servers, {"t": 1, "webhooks": 1, "reconciled": 1}, timeout_seconds=60)
        yield node.guarded


def proof(bootstrap: str, password: str = PASSWORD) -> dict[str, Any]:
    """The settings of a user who may enter."""
    user = {"kafka_security_protocol": "SASL_PLAINTEXT", "kafka_sasl_mechanism": "PLAIN", "kafka_username": "lake"}
    return {"kafka_bootstrap": bootstrap, "kafka_password": SecretStr(password), **user}


def config(bootstrap: str, password: str) -> dict[str, Any]:
    return kafka_config(Settings(**proof(bootstrap, password)), bootstrap)


def services(bootstrap: str, stripe_topic: str) -> Services:
    return Services(bootstrap, "t", stripe_topic, "")


def test_the_right_password_is_let_in(guarded: str) -> None:
    assert "t" in AdminClient(config(guarded, PASSWORD)).list_topics(timeout=30).topics


@pytest.mark.parametrize("said", ["wrong", None])
def test_others_are_not(guarded: str, said: str | None) -> None:
    with pytest.raises(KafkaException):
        AdminClient(config(guarded, said) if said else {"bootstrap.servers": guarded, "log_level": 0}).list_topics(timeout=3)


def test_a_writer_reads_as_its_user(guarded: str, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", **proof(guarded))
    producer = Producer(kafka_config(settings, guarded))
    producer.produce("t", b"{}")
    assert producer.flush(30) == 0
    lake = open_lake(settings)
    ingest(lake, Stream("raw.product_events", "t", guarded, received_by_kafka))
    assert lake.vector("raw.product_events") == {("t", 0): 1}


def test_a_writer_with_a_wrong_password_is_told_where_to_look(
    guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topics, "TIMEOUT_SECONDS", 3.0)
    lake = open_lake(Settings(home=tmp_path / "home", **proof(guarded, "wrong")))
    with pytest.raises((Retryable, Terminal), match=r"LAKEHOUSE_KAFKA_USERNAME|refuses access|does not let") as told:
        ingest(lake, Stream("raw.product_events", "t", guarded, received_by_kafka))
    assert "wrong" not in str(told.value)
    assert not lake.exists("raw.product_events")


@pytest.mark.parametrize(("password", "status"), [(PASSWORD, 200), ("wrong", 503)])
def test_the_receiver_answers_yes_only_where_it_is_let_in(guarded: str, tmp_path: Path, password: str, status: int) -> None:
    secret, body = "whsec_one", b'{"id": "evt_1", "object": "event", "type": "customer.updated"}'
    settings = Settings(home=tmp_path / "home", webhook_secrets=[secret], webhook_port=0, **proof(guarded, password))
    with jobs.receiver(settings, services(guarded, "webhooks"), time.time) as url:
        signed = {"Stripe-Signature": signature(secret, int(time.time()), body)}
        assert httpx.post(url, content=body, headers=signed, timeout=30).status_code == status
    if status == 200:
        lake = open_lake(settings)
        jobs.ingest(lake, services(guarded, "webhooks"), ["raw.stripe_events"])
        assert [r["payload"] for r in rows(lake, "SELECT payload FROM raw.stripe_events")] == [body]


def test_a_reconciliation_sends_as_its_user(guarded: str, tmp_path: Path) -> None:
    made = [event(i, NOW - DAY + i, customer(name=f"N{i}"), id=f"evt_{i}") for i in range(3)]
    with bench(tmp_path, made, withheld={"evt_1"}, **proof(guarded)) as b:
        report = jobs.reconcile(b.lake(), services(guarded, "reconciled"))
        assert (report.events.missing, report.events.sent) == (1, 1)
        jobs.ingest(b.lake(), services(guarded, "reconciled"), ["raw.stripe_events"])
        assert jobs.reconcile(b.lake(), services(guarded, "reconciled")).resolved == 1
