"""The same lake on each Iceberg catalog, and what the local services must really do for a test on them to mean anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.exceptions import CommitFailedException

from lakehouse.append import append_rows
from lakehouse.catalogs import open_catalog
from lakehouse.lake import TABLE_PROPERTIES, open_lake
from lakehouse.local import KINDS, Kind, LocalServices, local_services
from lakehouse.local.glue import GlueServer
from lakehouse.local.seaweedfs import SOCKETS
from lakehouse.processes import accepts
from lakehouse.queries import query
from lakehouse.settings import ROOT, Settings, load_settings
from tests.proxy import Answer, FaultProxy, Request

ROWS = pa.schema([("writer", pa.int64()), ("number", pa.int64())])
WRITERS, APPENDS = 3, 6


@pytest.fixture
def settings_of(local: LocalServices, monkeypatch: pytest.MonkeyPatch) -> Callable[[Kind, str], Settings]:
    """The settings of a lake on one of the catalogs, read from the environment as any process reads them."""

    def read(kind: Kind, name: str) -> Settings:
        for variable, value in local.environment(kind, name).items():
            monkeypatch.setenv(variable, value)
        return load_settings()

    return read


def append_at_once(settings: Settings) -> tuple[set[tuple[int, int]], list[tuple[int, int]]]:
    """Writers append to one table, each giving way to none: (the rows whose commit was accepted, the rows that are there)."""
    catalog = open_catalog(settings)
    catalog.create_namespace("raw")
    catalog.create_table("raw.contended", ROWS, properties=TABLE_PROPERTIES)
    accepted: set[tuple[int, int]] = set()
    start = threading.Barrier(WRITERS)

    def write(writer: int) -> None:
        own = open_catalog(settings)
        start.wait()
        for number in range(APPENDS):
            while True:
                try:
                    own.load_table("raw.contended").append(pa.table({"writer": [writer], "number": [number]}, ROWS))
                except CommitFailedException:
                    continue
                accepted.add((writer, number))
                break

    threads = [threading.Thread(target=write, args=(i,)) for i in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    rows = catalog.load_table("raw.contended").scan().to_arrow().to_pylist()
    return accepted, sorted((r["writer"], r["number"]) for r in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_of_commits_at_once_none_is_lost(settings_of: Callable[[Kind, str], Settings], kind: Kind) -> None:
    accepted, there = append_at_once(settings_of(kind, "contended"))
    assert there == sorted(accepted) == [(w, n) for w in range(WRITERS) for n in range(APPENDS)]


def test_the_trap_moto_as_it_comes_loses_commits(local: LocalServices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a fault test on it would prove nothing. If this fails, moto checks versions itself, and local/glue.py need not."""
    with GlueServer(tmp_path / "stock", version_check=False) as stock:
        for variable, value in (local.environment("glue", "stock") | {"LAKEHOUSE_GLUE_ENDPOINT": stock.endpoint}).items():
            monkeypatch.setenv(variable, value)
        accepted, there = append_at_once(load_settings())
    assert len(accepted) == WRITERS * APPENDS
    assert len(there) < len(accepted)


def test_the_aws_profile_needs_no_keys(
    local: LocalServices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: Path
) -> None:
    """Arrow, boto3 and DuckDB each find AWS's default chain by themselves: here its first link, the environment."""
    pytest.importorskip("duckdb_extension_aws", reason="the extra `aws` is not installed: make setup")
    environment = local.environment("glue", "no-keys") | {
        "LAKEHOUSE_PROFILE": "aws",
        "LAKEHOUSE_HOME": str(tmp_path / "home"),
        "LAKEHOUSE_CATALOG_DIR": str(declared),
        "LAKEHOUSE_KAFKA_BOOTSTRAP": "nowhere:1",
    }
    del environment["LAKEHOUSE_CATALOG_URI"]  # Glue is this profile's own
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", environment.pop("LAKEHOUSE_S3_ACCESS_KEY_ID"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", environment.pop("LAKEHOUSE_S3_SECRET_ACCESS_KEY"))
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    lake = open_lake(load_settings())
    rows = pa.table({"topic": ["t"], "partition": [0], "offset": [0], "received_at": [datetime(2026, 3, 1, tzinfo=UTC)]})
    append_rows(lake, "raw.records", rows, {}, {("t", 0): 1})
    assert query(lake, 'SELECT topic, "offset" FROM raw.records').to_pylist() == [{"topic": "t", "offset": 0}]
    assert lake.vector("raw.records") == {("t", 0): 1}


def test_the_manual_allows_the_calls_to_glue_that_are_made(
    local: LocalServices, declared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy of docs/aws.md, held to what creating, evolving, committing, looking and asking really call."""
    assert local.glue
    called = set()
    with FaultProxy(local.glue.endpoint) as glue:

        def note(request: Request, send: Callable[[], Answer]) -> Answer:
            called.add("glue:" + request.headers["x-amz-target"].rpartition(".")[2])
            return send()

        glue.rule = note
        environment = local.environment("glue", "manual") | {"LAKEHOUSE_CATALOG_DIR": str(declared)}
        for variable, value in (environment | {"LAKEHOUSE_GLUE_ENDPOINT": glue.url}).items():
            monkeypatch.setenv(variable, value)
        lake = open_lake(load_settings())
        rows = pa.table({"topic": ["t"], "partition": [0], "offset": [0], "received_at": [datetime(2026, 3, 1, tzinfo=UTC)]})
        append_rows(lake, "raw.records", rows, {}, {("t", 0): 1})
        wider = declared / "raw" / "records.yaml"
        wider.write_text(wider.read_text() + "  - {name: extra, type: string, pii: none, doc: new}\n")
        lake = open_lake(load_settings())
        assert lake.open_for_write("raw.records").schema().find_field("extra")
        assert list(lake.existing()) == ["raw.records"]
        assert query(lake, "SELECT topic FROM raw.records").to_pylist() == [{"topic": "t"}]
    policy = json.loads((ROOT / "docs" / "aws.md").read_text().split("```json")[1].split("```")[0])
    assert called == {action for s in policy["Statement"] for action in s["Action"] if action.startswith("glue:")}


def test_the_services_end_when_their_process_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom pathlib import Path\nfrom lakehouse.local import local_services\n"
            "with local_services(Path(sys.argv[1])) as s:\n"
            "    print(s.store.s3_endpoint, s.glue.endpoint, flush=True)\n    time.sleep(60)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout
    ports = [int(url.rsplit(":", 1)[1]) for url in holder.stdout.readline().split()]
    assert all(accepts(port) for port in ports)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(10)
    deadline = time.monotonic() + 10
    while any(accepts(port) for port in ports):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_store_keeps_its_objects_and_keys_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for start in range(2):
        with local_services(tmp_path, ("rest",)) as services:
            environment = services.environment("rest", "kept")
            for variable, value in environment.items():
                monkeypatch.setenv(variable, value)
            keys.append(environment["LAKEHOUSE_S3_SECRET_ACCESS_KEY"])
            catalog = open_catalog(load_settings())
            if start == 0:
                catalog.create_namespace("raw")
                catalog.create_table("raw.kept", ROWS).append(pa.table({"writer": [1], "number": [2]}, ROWS))
            assert catalog.load_table("raw.kept").scan().to_arrow().to_pylist() == [{"writer": 1, "number": 2}]
        assert services.store
        assert not [s for port in services.store.ports for s in SOCKETS.glob(f"seaweedfs-*-{port}.sock")]
    assert keys[0] == keys[1]
    assert (tmp_path / "seaweedfs" / "identities.json").stat().st_mode & 0o077 == 0
