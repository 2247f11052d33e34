"""The connector's export compared with ours: the same world agrees, each difference is told, ours is taken as of the sync."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest

from lakehouse.drift import TABLE as DRIFT
from lakehouse.errors import UsageError
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.settings import Settings
from simulator.account import Account
from simulator.world import WorldConfig, build_world
from tests.feed import rows
from tests.reconciling import DAY, NOW, as_webhook, customer, event, feed
from writers.vendor import VendorTable, compare_vendor

SYNCED = datetime.fromtimestamp(NOW, UTC)
RENAMED = {"subscription": "subscription_history"}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A Stripe object as the connector lays it out: parts by underscores, references by `_id`, times as times."""
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= flat(inner, f"{name}_{key}" if name else key)
        return found
    return {name: None if isinstance(value, list) else value}


TIMES = ("created", "start_date", "_at", "_start", "_end", "billing_cycle_anchor", "due_by", "cancel_at")
REFERENCES = ("customer", "charge", "payment_intent", "balance_transaction", "failure_balance_transaction", "latest_invoice")


def vendor_row(body: dict[str, Any], synced: datetime) -> dict[str, Any]:
    row = flat(body) | {"_fivetran_synced": synced, "_fivetran_active": True}
    for item in (body.get("items") or {}).get("data", ()):  # the connector keeps the period in its place
        row |= {name: item[name] for name in ("current_period_start", "current_period_end") if name in item}
    for column, value in list(row.items()):
        if column.endswith(TIMES) and isinstance(value, int) and not isinstance(value, bool):
            row[column] = datetime.fromtimestamp(value, UTC)
    for column in REFERENCES:
        if column in row:
            row[f"{column}_id"] = row.pop(column)
    return row


def export(folder: Path, table: str, bodies: list[dict[str, Any]], synced: datetime = SYNCED, suffix: str = "parquet") -> None:
    folder.mkdir(exist_ok=True)
    frame = pl.DataFrame([vendor_row(b, synced) for b in bodies], infer_schema_length=None)
    typed = frame.select(pl.exclude(pl.Null), pl.col(pl.Null).cast(pl.String))
    duckdb.from_arrow(typed.to_arrow()).write_parquet(str(folder / f"{table}.parquet")) if suffix == "parquet" else (
        typed.write_csv(folder / f"{table}.csv", datetime_format="%Y-%m-%d %H:%M:%S UTC")
    )


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return open_lake(Settings(home=tmp_path / "home"), Run("one", "test"))


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_the_same_world_agrees(lake: Lake, tmp_path: Path, suffix: str) -> None:
    world = build_world(WorldConfig(customers=40, days=40, product_events=1000))
    feed(lake, [as_webhook(e) for e in world.stripe_events])
    account, end = Account(world.stripe_events), world.end.timestamp()
    for kind in ("customer", "subscription", "charge", "refund", "dispute"):
        bodies = [f.body for f in account.objects(kind, end, True, None)]
        export(tmp_path / "export", RENAMED.get(kind, kind), bodies, world.end, suffix)
    done = compare_vendor(lake, tmp_path / "export")
    assert {name: t.differences for name, t in done.items()} == dict.fromkeys(done, 0)
    assert done["subscription_history"].compared > 40
    assert done["charge"].compared > 50
    assert rows(lake, f"SELECT * FROM {DRIFT}") == []


def test_each_difference_is_told_and_resolved_when_it_is_gone(lake: Lake, tmp_path: Path) -> None:
    created = [event(i, NOW - 60 * DAY + i, customer(f"cus_{i}"), "customer.created") for i in range(1, 5)]
    gone = event(9, NOW - 40 * DAY, customer("cus_4"), "customer.deleted")
    feed(lake, [as_webhook(e) for e in [*created[:2], created[3], gone]])
    theirs = [customer("cus_1"), customer("cus_3", name=None), customer("cus_2", email="other@example.com", delinquent=None)]
    export(tmp_path / "export", "customer", [theirs[0] | {"balance": 5}, *theirs[1:]])
    found = compare_vendor(lake, tmp_path / "export")["customer"]
    assert (found.compared, found.missing, found.extra, found.differing) == (3, 1, 0, 2)
    assert found.fields == {"balance_minor": 1, "email": 1}
    drift = rows(lake, f"SELECT object_id, field, state, ours, theirs, theirs_at, resolved_at FROM {DRIFT} ORDER BY ALL")
    assert [tuple(r.values())[:5] for r in drift] == [
        ("cus_1", "balance_minor", "missing", None, "5"),
        ("cus_2", "email", "differs", '"a@example.com"', '"other@example.com"'),
        ("cus_3", "*", "missing", None, None),
    ]
    assert {r["theirs_at"] for r in drift} == {SYNCED}
    export(tmp_path / "export", "customer", [customer("cus_1")])
    again = compare_vendor(lake, tmp_path / "export")["customer"]
    assert (again.missing, again.extra, again.differing) == (0, 1, 0)  # cus_2 is not theirs any more
    still = rows(lake, f"SELECT object_id, state FROM {DRIFT} WHERE resolved_at IS NULL")
    assert [tuple(r.values()) for r in still] == [("cus_2", "extra"), ("cus_3", "missing")]


def test_ours_is_taken_as_of_the_sync(lake: Lake, tmp_path: Path) -> None:
    """What changed after the sync is no difference; what changed in the minutes before it may be in it or not."""
    events = [
        event(1, NOW - 60 * DAY, customer("cus_1"), "customer.created"),
        event(2, NOW - 60 * DAY, customer("cus_2"), "customer.created"),
        event(3, NOW - 60, customer("cus_2", name="moments before")),
        event(4, NOW + 60, customer("cus_1", name="after")),
    ]
    feed(lake, [as_webhook(e) for e in events])
    export(tmp_path / "export", "customer", [customer("cus_1"), customer("cus_2")])
    found = compare_vendor(lake, tmp_path / "export")["customer"]
    assert (found.compared, found.differences, found.in_flight) == (2, 0, 1)


def test_a_dry_run_keeps_nothing_and_only_the_active_row_of_a_history_counts(lake: Lake, tmp_path: Path) -> None:
    feed(lake, [as_webhook(event(1, NOW - 60 * DAY, customer("cus_1"), "customer.created"))])
    export(tmp_path / "export", "customer", [customer("cus_1", name="other")])
    assert compare_vendor(lake, tmp_path / "export", dry_run=True)["customer"].differing == 1
    assert not lake.exists(DRIFT)


def test_what_is_no_export_is_told(lake: Lake, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    with pytest.raises(UsageError, match=r"holds none of the tables customer, product"):
        compare_vendor(lake, tmp_path / "export")
    (tmp_path / "export" / "charge.csv").write_text("id,amount\nch_1,5\n")
    with pytest.raises(UsageError, match="no column '_fivetran_synced'"):
        compare_vendor(lake, tmp_path / "export")


def test_every_mapped_column_is_one_of_ours() -> None:
    from lakehouse.declarations import load_reference
    from lakehouse.settings import ROOT

    shapes = load_reference(ROOT / "catalog", "stripe_objects")
    for name, spec in load_reference(ROOT / "catalog", "vendor_tables").items():
        ours = shapes[spec["object_type"]]["columns"]
        assert [c for c in spec["columns"].values() if c not in ours] == [], name
    assert VendorTable("x", missing=1, extra=2, differing=3).differences == 6
