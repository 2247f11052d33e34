"""The commands of docs/reconciliation.md, one after the other: webhooks that never came are found and repaired."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from command import SMALLEST, Ran, services_up, start

WITHHELD = 12


@contextlib.contextmanager
def stripe_api(home: Path, *arguments: str) -> Iterator[dict[str, str]]:
    """`lakehouse stripe-api` while the context is open; gives the variables it tells to export."""
    process = start(home, "stripe-api", *arguments)
    assert process.stdout is not None
    try:
        told = process.stdout.readline()
        yield dict(re.findall(r"(LAKEHOUSE_\w+)=(\S+)", told))
    finally:
        process.kill()
        process.wait()


def test_withheld_webhooks_are_found_and_repaired(tmp_path: Path, call: Callable[..., Ran]) -> None:
    home = tmp_path / "home"  # LAKEHOUSE_HOME of every test
    command = call
    played = command("demo", *SMALLEST, "--withhold", str(WITHHELD), "--json")
    assert played.code == 3, played
    assert played.json["verify"]["stripe_events"]["missing"] > 0
    assert "missing" in played.err
    with services_up(home), stripe_api(home, "--rate", "40", "--drop", "0.05", "--fail", "0.05") as api:
        fast = api | {"LAKEHOUSE_STRIPE_RATE_LIMIT": "100"}
        looked = command("reconcile", "--dry-run", "--json", **fast)
        assert looked.code == 3
        assert looked.json["differences"] == looked.json["events"]["missing"] == WITHHELD
        first = command("reconcile", "--json", **fast).fine().json
        assert (first["events"]["missing"], first["events"]["sent"], first["open"]) == (WITHHELD, WITHHELD, WITHHELD)
        command("ingest").fine()
        command("run").fine()
        repaired = command("verify", "--json")
        assert repaired.json["stripe_events"]["missing"] == 0
        assert repaired.json["problems"] == []
        second = command("reconcile", **fast).fine()
        assert f"{WITHHELD} earlier differences resolved, 0 open" in second.out
        drift = command("sql", "--json", "SELECT state, theirs, resolved_at FROM ops.reconciliation_drift").fine().json
        assert len(drift) == WITHHELD
        assert all(row["state"] == "missing" and row["resolved_at"] for row in drift)
        # nothing of the journey is left in the way of the next one
        assert command("reconcile", "--json", **fast).fine().json["events"]["missing"] == 0


def test_without_a_key_the_way_out_is_told(call: Callable[..., Ran], world: Path) -> None:
    call("reconcile", "--dry-run").failed(2, "set LAKEHOUSE_STRIPE_API_KEY", "dashboard")
    plain = {"LAKEHOUSE_STRIPE_API_KEY": "sk_live_x", "LAKEHOUSE_STRIPE_API_BASE": "http://api.example.com"}
    call("reconcile", **plain).failed(2, "LAKEHOUSE_STRIPE_API_BASE", "https://")


def test_without_a_world_there_is_nothing_to_serve(call: Callable[..., Ran]) -> None:
    call("stripe-api").failed(2, "lakehouse demo")


def test_an_unknown_type_is_told_the_known_ones(call: Callable[..., Ran], world: Path) -> None:
    environment = {"LAKEHOUSE_STRIPE_API_KEY": "sk_live_x", "LAKEHOUSE_STRIPE_API_BASE": "http://127.0.0.1:9"}
    call("reconcile", "--dry-run", "--objects", "things", **environment).failed(2, "'things'", "customer, subscription")


def test_the_simulated_api_ends_when_it_is_stopped(world: Path) -> None:
    process = start(world, "stripe-api")
    assert process.stdout is not None
    assert "LAKEHOUSE_STRIPE_API_KEY" in process.stdout.readline()
    process.terminate()
    assert process.wait(20) == 0


def test_a_vendor_export_is_compared(world: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    export = tmp_path / "export"
    call("compare-vendor", str(export)).failed(2, "is not a folder")
    export.mkdir()
    synced = "2026-06-01 00:00:00 UTC"
    (export / "customer.csv").write_text(f"id,email,_fivetran_synced\ncus_nobody,a@example.com,{synced}\n")
    told = call("compare-vendor", str(export), "--json", "--dry-run")
    assert told.code == 3
    assert (told.json["customer"]["compared"], told.json["customer"]["missing"]) == (1, 1)
    assert told.json["customer"]["extra"] > 10
    assert "lakehouse reconcile" in told.err
