"""What every test stands on: an environment that is not the developer's own, and a small lake to try things on.

Hypothesis runs as profile `ci` (the same examples every time) unless HYPOTHESIS_PROFILE says `dev` (many more, at random).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyiceberg.catalog
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from lakehouse.lake import Lake, Run, open_lake
from lakehouse.local import LocalServices, local_services
from lakehouse.local.kafka import KafkaBroker, why_unavailable
from lakehouse.settings import ROOT, Settings

SLOW_IS_FINE = [HealthCheck.too_slow]  # a loaded machine is no failure
hypothesis_settings.register_profile(
    "ci", derandomize=True, database=None, max_examples=60, deadline=None, suppress_health_check=SLOW_IS_FINE
)
hypothesis_settings.register_profile("dev", max_examples=1000, deadline=None, suppress_health_check=SLOW_IS_FINE)
hypothesis_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

FOREIGN = ("LAKEHOUSE_", "AWS_", "PYICEBERG_", "STREAMFORGE_")

# Three tables, one of each kind: a raw one that is appended to, one with keys and checks, and the real dead letters.
DECLARATIONS = {
    "raw/records.yaml": """
table: raw.records
doc: records as received
owner: tests
grain: one row a record
primary_key: [topic, partition, offset]
build: {mode: append}
partition: [{column: received_at, transform: day}]
sort: [topic, partition, offset]
columns:
  - {name: topic, type: string, pii: none, doc: topic}
  - {name: partition, type: int, pii: none, doc: partition}
  - {name: offset, type: long, pii: none, doc: offset}
  - {name: received_at, type: timestamptz, required: true, pii: none, doc: when}
  - {name: value, type: string, pii: none, doc: payload}
""",
    "billing/things.yaml": """
table: billing.things
doc: things, each once
owner: tests
grain: one row a thing
primary_key: [thing_id]
build: {mode: insert, driver: raw.records}
partition: [{column: thing_id, transform: "bucket[4]"}, {column: region, transform: identity}]
sort: [thing_id]
columns:
  - {name: thing_id, type: string, pii: none, doc: id}
  - {name: region, type: string, pii: none, doc: region}
  - {name: status, type: string, required: true, pii: none, doc: status, accepted: [on, "off", "it's"]}
  - {name: amount, type: long, pii: none, doc: amount}
checks:
  - {name: amount_positive, sql: "amount > 0"}
""".replace("[on,", '["on",'),
}


@pytest.fixture(scope="session", autouse=True)
def _not_the_developers_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(FOREIGN)]:
            patch.delenv(name)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        # read from ~/.pyiceberg.yaml and PYICEBERG_* when pyiceberg was imported, which was before this line
        patch.setattr(pyiceberg.catalog._ENV_CONFIG, "config", {})
        yield


@pytest.fixture(autouse=True)
def _a_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKEHOUSE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServices]:
    """An object store with an Iceberg REST catalog, and Glue: started by the first test that wants them, for all that follow."""
    with local_services(tmp_path_factory.mktemp("services")) as services:
        yield services


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """One node of Apache Kafka for all tests that only use it; one that stops or kills it starts its own."""
    if reason := why_unavailable():
        pytest.skip(reason)
    with KafkaBroker(tmp_path_factory.mktemp("kafka")) as running:
        yield running


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    """A folder with the declarations of the small lake."""
    folder = tmp_path / "catalog"
    real = (ROOT / "catalog" / "ops" / "dead_letters.yaml").read_text("utf-8")
    shared = (ROOT / "catalog" / "columns.yaml").read_text("utf-8")
    for place, text in (DECLARATIONS | {"ops/dead_letters.yaml": real, "columns.yaml": shared}).items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text, "utf-8")
    return folder


@pytest.fixture
def reopen(tmp_path: Path, declared: Path) -> Callable[[str], Lake]:
    """Open the small lake as another process would: with its own Iceberg catalog client and its own run id."""

    def open_again(run_id: str) -> Lake:
        return open_lake(Settings(home=tmp_path / "home", catalog_dir=declared), Run(run_id, "test"))

    return open_again


@pytest.fixture
def lake(reopen: Callable[[str], Lake]) -> Lake:
    """A small lake of the tables above, empty, in a folder of its own."""
    return reopen("one")
