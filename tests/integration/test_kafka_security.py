"""Apache Kafka that asks who is there: the settings reach every client, and a wrong password is said as such."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient

from lakehouse.broker import HOST, ensure_topics
from lakehouse.lake import open_lake
from lakehouse.local.kafka import KafkaBroker, why_unavailable
from lakehouse.local.process import free_ports
from lakehouse.services import kafka_config
from lakehouse.settings import Settings
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
        ensure_topics(node.bootstrap_servers, {"t": 1}, timeout_seconds=60)
        yield node.guarded


def config(bootstrap: str, password: str) -> dict[str, Any]:
    proof = {"kafka_security_protocol": "SASL_PLAINTEXT", "kafka_sasl_mechanism": "PLAIN", "kafka_username": "lake"}
    return kafka_config(Settings(kafka_bootstrap=bootstrap, kafka_password=password, **proof), bootstrap)


def test_the_right_password_is_let_in(guarded: str) -> None:
    assert "t" in AdminClient(config(guarded, PASSWORD)).list_topics(timeout=30).topics


@pytest.mark.parametrize("proof", ["wrong", None])
def test_others_are_not(guarded: str, proof: str | None) -> None:
    with pytest.raises(KafkaException):
        AdminClient(config(guarded, proof) if proof else {"bootstrap.servers": guarded, "log_level": 0}).list_topics(timeout=3)


def test_a_writer_reads_as_its_user(guarded: str, tmp_path: Path) -> None:
    proof = {"kafka_security_protocol": "SASL_PLAINTEXT", "kafka_sasl_mechanism": "PLAIN", "kafka_username": "lake"}
    settings = Settings(home=tmp_path / "home", kafka_bootstrap=guarded, kafka_password=PASSWORD, **proof)
    producer = Producer(kafka_config(settings, guarded))
    producer.produce("t", b"{}")
    assert producer.flush(30) == 0
    lake = open_lake(settings)
    ingest(lake, Stream("raw.product_events", "t", guarded, received_by_kafka))
    assert lake.vector("raw.product_events") == {("t", 0): 1}
