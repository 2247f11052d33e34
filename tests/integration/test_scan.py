"""Scanning a published table with Soda: a small lake, rows that keep every rule, rows that break each of them."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lakehouse import jobs
from lakehouse.commit import Change, commit
from lakehouse.errors import ChecksFailed, UsageError
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.render.soda import render_soda_contract
from lakehouse.scan import ScanReport, scan
from lakehouse.settings import load_settings
from lakehouse.staging import stage

TABLE = "billing.things"
DECLARATION = """
table: billing.things
doc: things
owner: team
grain: one row a thing
primary_key: [account, thing_id]
build: {mode: insert}
partition: [{column: began_at, transform: day}]
sort: [thing_id]
freshness_minutes: 5
columns:
  - {name: account, type: string, doc: account, pii: none}
  - {name: thing_id, type: long, doc: id, pii: none}
  - {name: status, type: string, doc: status, pii: none, accepted: [active, "it's", "on"]}
  - {name: began_at, type: timestamptz, doc: start, pii: none, required: true}
  - {name: ended_at, type: timestamptz, doc: end, pii: none}
  - {name: email, type: string, doc: address, pii: restricted}
checks:
  - {name: ends_after_it_begins, sql: "ended_at > began_at"}
"""
# What the table was before `began_at` became required: a file written then may hold NULL.
LOOSE = DECLARATION.replace(", required: true", "")

CHECKS = {'unique("account", "thing_id")', "not_null(account)", "not_null(thing_id)", "not_null(began_at)", "accepted(status)"}
CHECKS |= {"ends_after_it_begins", "row_count"}

DAY, NEXT = datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 2, tzinfo=UTC)
GOOD: dict[str, Any] = {"account": "a", "thing_id": 1, "status": "active", "began_at": DAY, "ended_at": NEXT, "email": "x@y.z"}

OpenLake = Callable[[str], Lake]


@pytest.fixture
def lake_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenLake:
    catalog = tmp_path / "catalog"
    (catalog / "billing").mkdir(parents=True)
    monkeypatch.setenv("LAKEHOUSE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LAKEHOUSE_CATALOG_DIR", str(catalog))
    monkeypatch.setenv("STREAMFORGE_CODE_VERSION", "test")

    def open_with(declaration: str) -> Lake:
        (catalog / "billing" / "things.yaml").write_text(declaration)
        return open_lake(load_settings(), Run("test", "test"))

    return open_with


def publish(lake: Lake, *rows: Mapping[str, Any]) -> None:
    """Stage and commit rows, without the checks that would hold them."""
    table = lake.open_for_write(TABLE)
    schema = pa.schema([(f, pa.timestamp("us", "UTC")) for f in ("began_at", "ended_at")])
    columns = {name: [row[name] for row in rows] for name in GOOD}
    data = pa.table({n: pa.array(v, schema.field(n).type) if n in schema.names else pa.array(v) for n, v in columns.items()})
    files = stage(table, lake.declaration(TABLE), data)
    commit(table, lake.run, Change(TABLE, {("t", 0): 0}, {("t", 0): len(rows)}, add=files))


def test_a_table_that_keeps_its_rules_passes(lake_of: OpenLake) -> None:
    lake = lake_of(DECLARATION)
    publish(lake, GOOD, GOOD | {"thing_id": 2, "status": "it's"}, GOOD | {"account": "b", "status": "on", "began_at": DAY})
    assert scan(lake, TABLE) == ScanReport(TABLE, passed=len(CHECKS), failed=[])
    assert jobs.scan_table(TABLE) == {"table": TABLE, "passed": len(CHECKS)}


@pytest.mark.parametrize(
    ("rows", "failed"),
    [
        ([GOOD, GOOD], ('unique("account", "thing_id")', "1 rows")),
        ([GOOD, GOOD, GOOD | {"began_at": DAY.replace(hour=5)}], ('unique("account", "thing_id")', "2 rows")),
        ([GOOD, GOOD | {"thing_id": 2, "began_at": None}], None),
        ([GOOD, GOOD | {"thing_id": 2, "status": "unheard of"}], ("accepted(status)", "1 rows")),
        ([GOOD, GOOD | {"thing_id": 2, "ended_at": DAY}], ("ends_after_it_begins", "1 rows")),
        ([GOOD, GOOD | {"thing_id": 2, "ended_at": None}], ("ends_after_it_begins", "1 rows")),  # NULL is not true
    ],
    ids=["doubled", "doubled over partitions", "missing", "not accepted", "check", "check is null"],
)
def test_rows_that_break_a_rule_are_reported(
    lake_of: OpenLake, rows: list[dict[str, Any]], failed: tuple[str, str] | None
) -> None:
    publish(lake_of(LOOSE), *rows)
    expected = [failed] if failed else [("not_null(began_at)", "1 rows"), ("ends_after_it_begins", "1 rows")]
    report = scan(lake_of(DECLARATION), TABLE)
    assert report == ScanReport(TABLE, len(CHECKS) - len(expected), expected)
    with pytest.raises(ChecksFailed, match=r"billing\.things: the published table breaks its contract: .*[12] rows"):
        jobs.scan_table(TABLE)


def test_everything_broken_at_once(lake_of: OpenLake) -> None:
    publish(lake_of(LOOSE), *[GOOD | {"status": "?", "began_at": None}] * 2)
    report = scan(lake_of(DECLARATION), TABLE)
    assert {name for name, _ in report.failed} == CHECKS - {"not_null(account)", "not_null(thing_id)", "row_count"}
    assert report.passed == 3


def test_an_empty_table_passes_unless_a_source_that_never_rests_fills_it(lake_of: OpenLake) -> None:
    lake = lake_of(DECLARATION)
    lake.open_for_write(TABLE)
    assert scan(lake, TABLE) == ScanReport(TABLE, len(CHECKS))
    raw = lake_of(DECLARATION.replace("mode: insert", "mode: append"))
    assert scan(raw, TABLE) == ScanReport(TABLE, len(CHECKS) - 1, [("row_count", "0 rows in the table")])


def test_a_rule_that_cannot_be_evaluated_never_passes(lake_of: OpenLake) -> None:
    publish(lake_of(DECLARATION), GOOD)
    report = scan(lake_of(DECLARATION.replace("ended_at > began_at", "no_such_column > 1")), TABLE)
    assert report.passed == 0  # Soda puts all checks in one query
    assert {name for name, _ in report.failed} == CHECKS
    assert {detail for _, detail in report.failed} == {
        'not evaluated: Binder Error: Referenced column "no_such_column" not found in FROM clause!'
    }


def test_an_error_while_reading_does_not_quote_the_value(lake_of: OpenLake, caplog: pytest.LogCaptureFixture) -> None:
    publish(lake_of(DECLARATION), GOOD)
    report = scan(lake_of(DECLARATION.replace("ended_at > began_at", "CAST(email AS INT) > 1")), TABLE)
    assert {detail for _, detail in report.failed} == {"not evaluated: Conversion Error"}
    assert "x@y.z" not in caplog.text


def test_a_contract_that_soda_reads_in_part_never_passes(lake_of: OpenLake, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = lake_of(DECLARATION)
    publish(lake, GOOD)
    whole = render_soda_contract(lake.declaration(TABLE))
    for broken, detail in [
        (whole.replace("failed_rows:", "failed_row:"), "failed_row"),  # a check that Soda does not know
        (whole.replace("- missing:\n      name: not_null(began_at)", "- {}"), ""),
    ]:
        assert broken != whole
        monkeypatch.setattr("lakehouse.scan.render_soda_contract", lambda _, text=broken: text)
        [(name, found)] = scan(lake, TABLE).failed
        assert name == "contract"
        assert detail in found


def test_a_scan_leaves_soda_s_own_log_to_a_host_that_uses_soda(lake_of: OpenLake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setenv("SODA_CORE_TELEMETRY_ENABLED", "false")
    from soda_core.common.logs import Logs

    Logs()
    handlers = logging.getLogger().handlers[:]
    lake = lake_of(DECLARATION.replace("ended_at > began_at", "no_such_column > 1"))
    publish(lake, GOOD)
    assert "no_such_column" in scan(lake, TABLE).failed[0][1]
    assert logging.getLogger().handlers == handlers != []


def test_a_scan_reads_the_current_snapshot(lake_of: OpenLake) -> None:
    lake = lake_of(DECLARATION)
    publish(lake, GOOD)
    assert scan(lake, TABLE).failed == []
    table = lake.open_for_write(TABLE)
    more = pa.table({k: [v] for k, v in GOOD.items()})
    commit(table, lake.run, Change(TABLE, {("t", 0): 1}, {("t", 0): 2}, add=stage(table, lake.declaration(TABLE), more)))
    assert scan(lake, TABLE).failed == [('unique("account", "thing_id")', "1 rows")]


def test_a_table_that_is_not_there_is_a_usage_error(lake_of: OpenLake) -> None:
    lake = lake_of(DECLARATION)
    with pytest.raises(UsageError, match="holds nothing yet"):
        scan(lake, TABLE)
    with pytest.raises(UsageError, match=r"did you mean billing\.things"):
        scan(lake, "billing.thing")


def test_a_scan_is_offline_and_silent(
    lake_of: OpenLake, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[object] = []

    def refuse(*address: object) -> None:
        asked.append(address)
        raise OSError("offline")

    lake = lake_of(DECLARATION)
    publish(lake, GOOD, GOOD)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    handlers = logging.getLogger().handlers[:]
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SODA_CORE_TELEMETRY_ENABLED", "true")
    assert scan(lake, TABLE).failed
    assert os.environ["SODA_CORE_TELEMETRY_ENABLED"] == "false"  # what Soda sends, it sends later, from a thread
    assert asked == []
    assert capfd.readouterr() == ("", "")
    assert [r.name for r in caplog.records if r.name.startswith("soda")] == []
    assert logging.getLogger().handlers == handlers
    assert not any(h.filters for h in handlers)
