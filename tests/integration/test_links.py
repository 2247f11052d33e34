"""What belongs together is found by links: shown by taking away what does not, and by building without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest

from lakehouse.lake import Lake, Run, open_lake
from lakehouse.live import files_where
from lakehouse.queries import files_sql, query
from lakehouse.runner import run
from lakehouse.settings import Settings
from tests.feed import feed_stripe

LINKS = "billing.object_links"
VERSIONS = "billing.event_versions"
HISTORY = "billing.subscription_history"
BY_LINKS = ("billing.plan_timeline", "billing.mrr_movements", "billing.revenue_ledger")
TABLES = (VERSIONS, "billing.object_heads", LINKS, HISTORY, *BY_LINKS)

# customers on both sides of ours: bounds of a file do not say that it holds none of ours
OTHERS: list[dict[str, Any]] = [
    {"id": "evt_o1", "at": "2026-01-01T10:00:00Z", "subscription": {"id": "sub_o1", "customer": "cus_0"}},
    {"id": "evt_o2", "at": "2026-01-01T10:00:00Z", "subscription": {"id": "sub_o2", "customer": "cus_9"}},
    {"id": "evt_o3", "type": "charge.succeeded", "at": "2026-01-01T10:00:00Z", "charge": {"id": "ch_o", "amount": 100}},
]
OURS: list[dict[str, Any]] = [
    {"id": "evt_1", "at": "2026-01-02T10:00:00Z", "subscription": {"id": "sub_1", "customer": "cus_1"}},
    {"id": "evt_2", "at": "2026-01-02T11:00:00Z", "subscription": {"id": "sub_2", "customer": "cus_1", "quantity": 5}},
    {"id": "evt_3", "type": "charge.succeeded", "at": "2026-01-02T10:00:00Z", "charge": {"id": "ch_1", "amount": 1000}},
    {
        "id": "evt_4",
        "type": "refund.created",
        "at": "2026-01-03T10:00:00Z",
        "refund": {"id": "re_1", "charge": "ch_1", "amount": 100},
    },
]
NEWS: list[dict[str, Any]] = [
    {"id": "evt_5", "at": "2026-01-05T10:00:00Z", "subscription": {"id": "sub_1", "customer": "cus_1", "status": "canceled"}},
    {
        "id": "evt_6",
        "type": "refund.created",
        "at": "2026-01-05T10:00:00Z",
        "refund": {"id": "re_2", "charge": "ch_1", "amount": 50},
    },
]


def make(path: Path) -> Lake:
    return open_lake(Settings(home=path), Run("test", "test"))


def filled(path: Path, tables: tuple[str, ...] = TABLES) -> Lake:
    """Others first, so that their rows lie in files of their own; then ours; then the news, in raw alone."""
    lake = make(path)
    for batch in (OTHERS, OURS):
        feed_stripe(lake, *batch)
        run(lake, tables)
    feed_stripe(lake, *NEWS)
    return lake


def contents(lake: Lake) -> dict[str, pl.DataFrame]:
    return {n: pl.DataFrame(query(lake, f"SELECT * FROM {n}")).sort(lake.declaration(n).primary_key) for n in BY_LINKS}


def take_away(lake: Lake, name: str, column: str, *values: str) -> None:
    """Delete, behind the lake's back, the files that hold rows of these values alone."""
    table = lake.load(name)
    gone = 0
    for file in files_where(table):
        with duckdb.connect() as connection:
            found = connection.execute(f"SELECT DISTINCT {column} FROM {files_sql(table, [file])}").fetchall()
        if {value for (value,) in found} <= set(values):
            Path(file.file_path.removeprefix("file://")).unlink()
            gone += 1
    assert gone, f"no file of {name} holds {values} alone"


def take_others_away(lake: Lake) -> None:
    take_away(lake, HISTORY, "subscription_id", "sub_o1", "sub_o2")
    take_away(lake, VERSIONS, "object_id", "ch_o")


def test_what_is_not_linked_is_not_read(tmp_path: Path) -> None:
    run(whole := filled(tmp_path / "whole"), TABLES)
    expected = contents(whole)
    assert expected["billing.plan_timeline"].filter(pl.col("customer_id") == "cus_1")["subscription_id"].to_list() == [
        "sub_1", "sub_2",
    ]  # fmt: skip
    lake = filled(tmp_path / "lake")
    run(lake, TABLES[:4])
    take_others_away(lake)
    run(lake, TABLES)
    found = contents(lake)
    assert all(found[name].equals(expected[name]) for name in BY_LINKS)


@pytest.mark.parametrize("name", BY_LINKS)
def test_links_that_lag_behind_are_not_asked(tmp_path: Path, name: str) -> None:
    lake = filled(tmp_path)
    run(lake, [n for n in TABLES[:4] if n != LINKS])
    take_others_away(lake)
    with pytest.raises(duckdb.IOException):
        run(lake, [name])
    run(lake, [LINKS])
    run(lake, [name])


def test_without_any_links_the_tables_are_the_same(tmp_path: Path) -> None:
    run(with_links := filled(tmp_path / "with"), TABLES)
    without = tuple(n for n in TABLES if n != LINKS)
    run(bare := filled(tmp_path / "without", without), without)
    assert not bare.exists(LINKS)
    one, other = contents(with_links), contents(bare)
    assert all(one[name].equals(other[name]) for name in BY_LINKS)


def test_a_fee_leads_through_its_dispute_to_the_charge_and_all_its_refunds(tmp_path: Path) -> None:
    """Two links up and two down: a batch that brings the fee alone posts it to the origin that it does not name."""
    lake = filled(tmp_path)
    dispute = {"id": "dp_1", "object": "dispute", "charge": "ch_1", "amount": 1000, "currency": "usd", "status": "needs_response"}
    feed_stripe(lake, {"id": "evt_7", "type": "charge.dispute.created", "at": "2026-01-06T10:00:00Z", "object": dispute})
    run(lake, TABLES)
    fee = {"id": "txn_1", "object": "balance_transaction", "source": "dp_1", "amount": -1000, "fee": 1500, "currency": "usd"}
    fee |= {"created": 1767780000, "reporting_category": "dispute"}
    told = dispute | {"balance_transactions": [fee]}
    feed_stripe(lake, {"id": "evt_8", "type": "charge.dispute.updated", "at": "2026-01-07T10:00:00Z", "object": told})
    run(lake, TABLES)
    entries = pl.DataFrame(query(lake, "SELECT * FROM billing.revenue_ledger WHERE entry_type = 'dispute_fee'"))
    assert entries["origin_id"].to_list() == ["ch_1"]
    assert entries["amount_minor"].to_list() == [-1500]
