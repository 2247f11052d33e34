"""The brokers that writers are tested on: the embedded one, and real Apache Kafka where it can be started."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lakehouse.broker import EmbeddedBroker
from tests.brokers import Broker


@pytest.fixture(scope="session", params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Each broker in turn: what holds on one must hold on the other."""
    if request.param == "kafka":
        yield request.getfixturevalue("kafka")
        return
    with EmbeddedBroker(tmp_path_factory.mktemp("broker")) as running:
        yield running
