"""Commands over a lake that is there, and over none: looking, building, rolling back, scanning, rendering, cleaning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command import Ran

from lakehouse.cli.app import age, counted, size
from lakehouse.settings import ROOT

TABLE_ARGUMENT = [
    ["hash"],
    ["maintain"],
    ["positions", "show"],
    ["show"],
    ["where"],
    ["reproduce"],
    ["run"],
    ["scan"],
    ["render", "soda"],
    ["render", "snowflake"],
    ["render", "dictionary"],
]


@pytest.mark.parametrize("command", TABLE_ARGUMENT, ids=" ".join)
def test_a_table_that_is_not_there_is_answered_with_the_closest(call: Callable[..., Ran], command: list[str]) -> None:
    call(*command, "product.event").failed(2, "no table 'product.event'", "did you mean product.events?")
    call(*command, "zzz").failed(2, "no table 'zzz'", "lakehouse status")


def test_show(call: Callable[..., Ran], world: Path) -> None:
    found = call("show", "product.events", "--json").fine().json
    assert (found["rows"], found["exists"], found["fresh"]) == (5000, True, True)
    assert found["declaration"]["path"] == "catalog/product/events.yaml"
    assert found["snapshots"][0]["total_rows"] == 5000
    out = call("show", "product.events", "--snapshots", "1").fine().out
    for part in (
        "5,000 rows",
        "pseudonymous",
        "restricted",
        "day(occurred_at)",
        "fresh",
        str(found["snapshots"][0]["snapshot_id"]),
    ):
        assert part in out
    assert str(found["snapshots"][1]["snapshot_id"]) not in out


def test_show_of_a_table_that_holds_nothing_yet(call: Callable[..., Ran]) -> None:
    assert "fill it: lakehouse demo" in call("show", "product.events").fine().out
    assert call("show", "product.events", "--json").fine().json["exists"] is False
    call("run", "product.events").fine()  # makes it, without a row
    assert "none yet" in call("show", "product.events").fine().out


def test_where_names_the_files_the_sources_and_what_it_feeds(call: Callable[..., Ran]) -> None:
    found = call("where", "product.events", "--json").fine().json
    assert {"catalog/product/events.yaml", "transforms/product/events.py"} <= set(found["own"])
    assert "raw.product_events" in found["made_from"]
    assert "marts.upgrade_exposures" in found["feeds"]
    assert [f for f in found["own"] + found["naming"] if not (ROOT / f).is_file()] == []
    assert "  transforms/product/events.py" in call("where", "product.events").fine().out.splitlines()


def test_status(call: Callable[..., Ran], world: Path) -> None:
    rows = {r["table"]: r for r in call("status", "--json").fine().json}
    assert rows["product.events"]["rows"] == 5000
    assert {r["behind"] for r in rows.values()} == {0, None}
    out = call("status").fine().out
    assert "5,000" in out
    assert " ago" in out


def test_status_of_an_empty_lake_has_the_same_fields(call: Callable[..., Ran]) -> None:
    rows = call("status", "--json").fine().json
    assert {tuple(r) for r in rows} == {
        ("table", "exists", "rows", "files", "bytes", "last_commit_at", "snapshots", "behind", "ignored")
    }


def test_on_a_small_screen_names_and_numbers_stay_in_one_piece(call: Callable[..., Ran], world: Path) -> None:
    tables = [r["table"] for r in call("status", "--json").json]
    built = [r["table"] for r in call("run", "--json").json]
    raw = str(call("show", "raw.product_events", "--json").json["snapshots"][0]["snapshot_id"])
    variables = [r["variable"] for r in call("settings", "--json").json]
    for command, whole in (
        (["status"], [*tables, "5,000"]),
        (["run"], [*built, "seconds"]),
        (["scan", "ops.dead_letters"], ["ops.dead_letters"]),
        (["settings"], variables),
        (["show", "raw.product_events"], [raw, "kafka_timestamp", "pseudonymous", "timestamptz"]),
        (["verify"], ["subscription history", "all of it agrees"]),
    ):
        out = call(*command, COLUMNS="80").fine().out
        assert max(len(line) for line in out.splitlines()) <= 80
        assert [w for w in whole if w not in out] == []


def test_without_a_lake(call: Callable[..., Ran]) -> None:
    assert "The lake is empty. Fill it: lakehouse demo" in call("status").fine().out
    assert "nothing to scan" in call("scan").fine().out
    assert call("scan", "--json").fine().json == []
    call("verify").failed(2, "holds no world to compare with", "lakehouse demo")
    call("ingest").failed(2, "no Kafka broker", "lakehouse up", "LAKEHOUSE_KAFKA_BOOTSTRAP")
    call("sql", "SELECT * FROM product.events").failed(2, "product.events is declared but holds nothing yet", "lakehouse demo")
    call("rollback", "product.events", "1").failed(2, "holds nothing yet")


def test_verify_and_scan_pass(call: Callable[..., Ran], world: Path) -> None:
    assert "all of it agrees" in call("verify").fine().out
    told = call("verify", "--first", "--json").fine().json
    first, now = told["attribution_first_written"], told["attribution"]
    assert first["checked"] == now["checked"] == now["correct"] > first["correct"] > 0.9 * now["correct"]
    reports = call("scan", "product.events", "ops.dead_letters", "--json").fine().json
    assert [r["table"] for r in reports] == ["product.events", "ops.dead_letters"]
    assert all(r["passed"] > 1 and r["failed"] == [] for r in reports)


def test_a_raw_table_is_not_built(call: Callable[..., Ran], world: Path) -> None:
    call("run", "raw.product_events").failed(2, "raw.product_events is not built from other tables", "lakehouse ingest")


def test_run_again_writes_nothing(call: Callable[..., Ran], world: Path) -> None:
    assert {r["snapshot_id"] for r in call("run", "--json").fine().json} == {None}
    assert "Nothing was new" in call("run").fine().out


@pytest.mark.parametrize("table", ["product.events", "billing.event_versions", "marts.upgrade_funnel"])
def test_rolled_back_and_run_again_it_holds_the_same_rows(call: Callable[..., Ran], world: Path, table: str) -> None:
    every_row = f"SELECT * FROM {table} ORDER BY ALL"
    before = call("sql", every_row, "--json").fine().json
    first = call("show", table, "--json").json["snapshots"][-1]
    back = call("rollback", table, str(first["snapshot_id"]), "--json").fine().json
    assert back["snapshot_id"] == first["snapshot_id"]
    assert back["positions"]
    assert len(call("sql", every_row, "--json").json) == first["total_rows"] != len(before)
    call("run", table).fine()
    assert call("sql", every_row, "--json").json == before
    call("verify").fine()


def test_a_lake_that_lacks_rows_does_not_pass(call: Callable[..., Ran], world: Path) -> None:
    """The verdict is exit 3, and says what is missing; JSON is complete all the same."""
    first = call("show", "product.events", "--json").json["snapshots"][-1]
    call("rollback", "product.events", str(first["snapshot_id"])).fine()
    ran = call("verify", "--json")
    assert ran.code == 3
    assert f"product_events: {5000 - first['total_rows']:,} missing" in ran.err
    assert ran.json["product_events"]["missing"] == 5000 - first["total_rows"]
    out = call("status").out
    assert "Catch up: lakehouse run" in out
    call("run").fine()
    call("verify").fine()


def test_rollback_to_a_snapshot_that_is_not_there(call: Callable[..., Ran], world: Path) -> None:
    call("rollback", "product.events", "12345").failed(2, "snapshot 12345 is not in its history", "lakehouse show product.events")


def test_render(call: Callable[..., Ran], tmp_path: Path) -> None:
    assert "CREATE" in call("render", "snowflake", "product.events").fine().out
    assert "billing.customers" in call("render", "dictionary").fine().out
    contract = yaml.safe_load(call("render", "soda", "product.events").fine().out)
    assert contract["checks"]
    ran = call("render", "soda", "--to", str(tmp_path / "new" / "[x]"))
    files = sorted((tmp_path / "new" / "[x]").rglob("*.yaml"))
    assert ran.fine().err == f"wrote {len(files)} files to {tmp_path}/new/[x]\n"
    assert ran.out == ""
    declared = [path for path in (ROOT / "catalog").glob("*/*.yaml") if path.parent.name != "reference"]
    assert len(files) == len(declared)
    one = call("render", "dictionary", "--to", str(tmp_path), "--json").fine()
    assert one.json == [str(tmp_path / "data-dictionary.md")]
    assert "wrote 1 file to" in one.err


def test_render_to_what_is_no_folder(call: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    call("render", "soda", "--to", str(file)).failed(2, f"--to {file}: not a folder")
    call("render", "soda", "--to", str(file / "below")).failed(1, str(file), "Not a directory")
    assert file.read_text() == "mine"


def test_clean_removes_a_home_and_nothing_else(call: Callable[..., Ran], tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert "nothing to remove" in call("clean", "--yes").fine().out
    home.mkdir()
    (home / "thesis.txt").write_text("mine")
    call("clean", "--yes").failed(2, "does not look like a lakehouse home")
    assert (home / "thesis.txt").read_text() == "mine"
    (home / "thesis.txt").unlink()
    call("status").fine()  # even looking makes the Iceberg catalog's file
    assert "removed" in call("clean", "--yes").fine().out
    assert not home.exists()
    call("clean", "--yes", LAKEHOUSE_PROFILE="local").failed(2, "profile")


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_234_567)] == ["0 B", "999 B", "1.0 KB", "1.2 MB"]
    assert [age(n) for n in (0.4, 59, 60, 7199, 86_400, 200_000)] == [
        "0 s ago",
        "59 s ago",
        "1 min ago",
        "2 hours ago",
        "1 day ago",
        "2 days ago",
    ]
    assert [counted(n, "file") for n in (0, 1, 2_000)] == ["0 files", "1 file", "2,000 files"]
    assert json.dumps(size(10**18)) == '"1000000.0 TB"'


def test_replay_tells_what_waits_and_what_is_still_refused(call: Callable[..., Ran], world: Path) -> None:
    waiting = call("replay", "product.events", "--dry-run", "--json").fine().json["open"]
    assert waiting
    told = call("replay", "product.events", "--reason", "not_json").fine().out
    assert f"{waiting['not_json']} letter" in told
    assert "0 resolved" in told
    assert "not_json" in told
    assert "No open dead letters" in call("replay", "product.events", "--to", "2020-01-01").fine().out
    assert call("replay", "product.events", "--dry-run", "--json").fine().json["open"] == waiting
    call("replay", "billing.plan_timeline").failed(2, "takes no records from raw")


def test_a_table_is_hashed_and_made_again_from_its_record(call: Callable[..., Ran], world: Path, tmp_path: Path) -> None:
    record = call("hash", "product.events", "--json").fine()
    assert f"{record.json['hash']}  product.events, 5,000 rows" in call("hash", "product.events").fine().out
    kept = tmp_path / "record.json"
    kept.write_text(record.out)
    done = call("reproduce", "product.events", "--record", str(kept), "--json").fine().json
    assert (done["same"], done["hash"], done["rows"]) == (True, record.json["hash"], 5000)
    kept.write_text(record.out.replace(record.json["hash"], "0" * 32))
    told = call("reproduce", "product.events", "--record", str(kept))
    assert told.code == 3
    assert "is not what its inputs give" in told.err
    call("reproduce", "billing.prices", "--record", str(kept)).failed(2, "is of product.events, not of billing.prices")
    call("reproduce", "billing.prices", "--record", str(tmp_path / "none")).failed(2, "make one: lakehouse hash billing.prices")


@pytest.mark.usefixtures("world")
def test_the_audit_agrees_with_a_played_world(call: Callable[..., Ran], tmp_path: Path) -> None:
    metrics = {"LAKEHOUSE_METRICS_FILE": str(tmp_path / "audit.prom")}
    found = call("audit", "attribution", "--sample", "500", "--json", **metrics).fine().json
    assert (found["checked"], found["agree"], found["share"], found["at_least"], found["examples"]) == (500, 500, 1.0, 0.999, [])
    assert list(found["outcomes"])[:2] == ["resolved", "unmapped_workspace"]
    assert 'lakehouse_audit_agreement{audit="attribution"} 1.0' in (tmp_path / "audit.prom").read_text()
    said = call("audit", "attribution", "--sample", "500", "--from", "2026-01-05").fine().out
    assert "500 of 500 rows agree (100.0000%)." in said
    call("audit", "attribution", "--days", "3", "--from", "2026-01-05").failed(2, "--days looks back from the newest row")
    call("audit", "attribution", "--to", "2020-01-01").failed(2, "product.events has no rows in this window")
    call("audit", "plan").failed(2, "there is no audit 'plan'; there are: attribution")
