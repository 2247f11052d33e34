"""The small lake of tests/conftest.py on every Iceberg catalog, and the wire to that catalog, which can fail.

`lake` reaches its catalog (and its object store) through proxies; `other` and `reopen` reach them directly. SQLite has no wire
of its own: there, the fault stands in front of `commit_table`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from records import CallWire, HttpWire, Wire, settings_of

from lakehouse.lake import Lake, Run, open_lake
from lakehouse.local import KINDS, Kind, LocalServices
from tests.proxy import FaultProxy

_numbers = itertools.count()


@dataclass(frozen=True)
class Proxies:
    """In front of the object store, the REST catalog and Glue."""

    store: FaultProxy
    rest: FaultProxy
    glue: FaultProxy


@pytest.fixture(scope="session")
def proxies(local: LocalServices) -> Iterator[Proxies]:
    assert local.store
    assert local.glue
    with (
        FaultProxy(local.store.s3_endpoint) as store,
        FaultProxy(local.store.catalog_uri) as rest,
        FaultProxy(local.glue.endpoint) as glue,
    ):
        yield Proxies(store, rest, glue)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Which Iceberg catalog the lake is on."""
    found: Kind = request.param
    return found


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lakehouse.publish.FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr("lakehouse.catalogs.READ_ATTEMPTS", 1)


@pytest.fixture
def environment(kind: Kind, request: pytest.FixtureRequest, tmp_path: Path) -> Mapping[str, str]:
    """The settings of an empty lake, as any process reads them."""
    if kind == "sqlite":
        return {"LAKEHOUSE_HOME": str(tmp_path / "home")}
    local: LocalServices = request.getfixturevalue("local")
    return local.environment(kind, f"fault-{next(_numbers)}") | {"LAKEHOUSE_HOME": str(tmp_path / "home")}


@pytest.fixture
def reopen(environment: Mapping[str, str], declared: Path) -> Callable[[str], Lake]:
    """Open the lake as another process would: with its own client and its own run id."""

    def open_again(run_id: str) -> Lake:
        return open_lake(settings_of(environment, catalog_dir=declared), Run(run_id, "test"))

    return open_again


@pytest.fixture
def other(reopen: Callable[[str], Lake]) -> Lake:
    """The same lake, as another process has it open."""
    return reopen("other")


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Iterator[FaultProxy]:
    """The proxy between `lake` and its object store, for the catalogs that have one."""
    proxy: FaultProxy = request.getfixturevalue("proxies").store
    yield proxy
    proxy.reset()


@pytest.fixture
def lake(kind: Kind, environment: Mapping[str, str], declared: Path, request: pytest.FixtureRequest) -> Lake:
    """The lake, reached through the proxies."""
    proxied = dict(environment)
    if kind != "sqlite":
        proxies: Proxies = request.getfixturevalue("proxies")
        proxied["LAKEHOUSE_S3_ENDPOINT"] = proxies.store.url
        if kind == "rest":
            proxied["LAKEHOUSE_CATALOG_URI"] = proxies.rest.url
        else:
            proxied["LAKEHOUSE_GLUE_ENDPOINT"] = proxies.glue.url
    return open_lake(settings_of(proxied, catalog_dir=declared), Run("one", "test"))


@pytest.fixture
def wire(kind: Kind, lake: Lake, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """Between the commit path and the catalog of `lake`: each fault in its queue meets one commit, the others pass."""
    if kind == "sqlite":
        yield CallWire(lake.catalog, monkeypatch)
        return
    proxies: Proxies = request.getfixturevalue("proxies")
    proxy = proxies.rest if kind == "rest" else proxies.glue
    yield HttpWire(proxy, kind)
    errors = proxy.errors
    proxy.reset()
    assert errors == []
