"""The whole road on real services: signed webhooks, Kafka and a CRM to the marts, on S3 and an Iceberg REST catalog or Glue.

Kafka is Apache Kafka where it can be started, else the embedded broker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from lakehouse.broker import EmbeddedBroker, ensure_topics
from lakehouse.lake import Lake, open_lake
from lakehouse.local import Kind, LocalServices
from lakehouse.local.kafka import KafkaBroker, available
from lakehouse.queries import query
from lakehouse.rollback import rollback_table
from lakehouse.runner import run
from lakehouse.scan import scan
from lakehouse.services import Services, find_services
from lakehouse.settings import load_settings
from simulator.demo import play, verify
from writers.jobs import ingest, ingest_crm, receiver

SECRET = SecretStr("whsec_of_the_road")
SCANNED = ("raw.stripe_events", "product.events")


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[str]:
    with KafkaBroker(tmp_path / "kafka") if available() else EmbeddedBroker(tmp_path / "kafka") as broker:
        ensure_topics(broker.bootstrap_servers, {"product.events": 2, "stripe.webhooks": 2}, timeout_seconds=60)
        yield broker.bootstrap_servers


@pytest.mark.parametrize("kind", ["rest", "glue"])
def test_the_road(local: LocalServices, kafka: str, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = local.environment(kind, f"road-{kind}") | {
        "LAKEHOUSE_HOME": str(tmp_path / "home"),
        "LAKEHOUSE_PROFILE": "local",
        "LAKEHOUSE_KAFKA_BOOTSTRAP": kafka,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load_settings().model_copy(update={"webhook_secrets": [SECRET]})
    lake = open_lake(settings)

    @contextlib.contextmanager
    def services(clock: Callable[[], float]) -> Iterator[Services]:
        found = find_services(settings)
        with receiver(settings, found, clock) as url:
            yield Services(found.bootstrap, found.product_topic, found.stripe_topic, found.crm_url, url)

    def after_round(found: Services, now: datetime) -> None:
        ingest(lake, found, seen_at=now)
        run(lake)

    played = play(
        tmp_path / "home" / "world",
        services,
        lambda now: ingest_crm(lake, settings.crm_database_url, seen_at=now),
        after_round,
        webhook_secret=SECRET.get_secret_value(),
        rounds=2,
        progress=lambda *_: None,
        customers=20,
        days=20,
        product_events=2_000,
        seed=7,
    )
    assert played["posted"] > 0
    verdict = verify(tmp_path / "home" / "world", lambda sql: query(lake, sql))
    assert verdict["problems"] == []
    assert {name: scan(lake, name).failed for name in SCANNED} == {name: [] for name in SCANNED}
    _goes_back_and_on(lake)
    written = {f.file_path for name in lake.existing() for f in live(lake, name)}
    assert written
    assert all(path.startswith(settings.iceberg_warehouse) for path in written)
    assert not (tmp_path / "home" / "warehouse").exists()  # nothing fell back on local files


def live(lake: Lake, name: str) -> list[Any]:
    return [task.file for task in lake.load(name).scan().plan_files()]


def _goes_back_and_on(lake: Lake) -> None:
    """A rollback of product.events and the run after it give the same rows; time travel reads the state before."""
    name = "product.events"
    before = query(lake, f"SELECT * FROM {name} ORDER BY event_id")
    first = lake.load(name).snapshots()[0]
    earlier = query(lake, f"SELECT count(*) AS n FROM {name}", first.snapshot_id).to_pylist()[0]["n"]
    assert 0 <= earlier < before.num_rows
    rollback_table(lake, name, first.snapshot_id)
    assert query(lake, f"SELECT count(*) AS n FROM {name}").to_pylist() == [{"n": earlier}]
    run(lake, [name])
    assert query(lake, f"SELECT * FROM {name} ORDER BY event_id").equals(before)
