"""What comes in order is taken up without any older version: shown by taking the older versions away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pytest

from lakehouse.lake import Lake, Run, open_lake
from lakehouse.queries import query
from lakehouse.runner import run
from lakehouse.settings import Settings
from tests.feed import feed_stripe

TABLES = (
    "billing.event_versions",
    "billing.object_heads",
    "billing.subscriptions",
    "billing.subscription_history",
    "billing.subscription_items",
    "billing.subscription_item_history",
)
FIRST: list[dict[str, Any]] = [
    {"id": "evt_1", "at": "2026-01-01T10:00:00Z", "subscription": {"status": "trialing", "quantity": 2}},
    {"id": "evt_2", "at": "2026-01-02T10:00:00Z", "subscription": {"id": "sub_2"}},
]


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    found = open_lake(Settings(home=tmp_path), Run("test", "test"))
    feed_stripe(found, *FIRST)
    run(found, TABLES)
    return found


def versions_files(lake: Lake) -> list[Path]:
    return [Path(task.file.file_path.removeprefix("file://")) for task in lake.load("billing.event_versions").scan().plan_files()]


def test_in_order_no_older_version_is_read(lake: Lake) -> None:
    older = versions_files(lake)
    feed_stripe(
        lake,
        {"id": "evt_3", "at": "2026-01-03T10:00:00Z", "subscription": {"status": "active", "quantity": 2}},
        {"id": "evt_4", "at": "2026-01-03T10:00:00Z", "subscription": {"id": "sub_3"}},
    )
    run(lake, TABLES[:1])  # which looks whether their ids are there already
    for file in older:
        file.unlink()
    run(lake, TABLES)
    history = "SELECT subscription_id, status, quantity, valid_from, valid_to IS NULL AS open FROM billing.subscription_history"
    found = query(lake, f"{history} ORDER BY subscription_id, valid_from").to_pylist()
    assert [(r["subscription_id"], r["status"], r["quantity"], r["valid_from"].day, r["open"]) for r in found] == [
        ("sub_1", "trialing", 2, 1, False),
        ("sub_1", "active", 2, 3, True),
        ("sub_2", "active", 1, 2, True),
        ("sub_3", "active", 1, 3, True),
    ]


def test_a_late_event_needs_the_versions_of_its_object(lake: Lake) -> None:
    for file in versions_files(lake):
        file.unlink()
    feed_stripe(lake, {"id": "evt_0", "at": "2026-01-01T09:00:00Z", "subscription": {"status": "incomplete"}})
    with pytest.raises(duckdb.IOException):
        run(lake, TABLES)


def test_the_versions_of_late_objects_are_read_once_for_all_tables_of_a_run(lake: Lake) -> None:
    older = versions_files(lake)
    feed_stripe(lake, {"id": "evt_0", "at": "2026-01-01T09:00:00Z", "subscription": {"status": "incomplete", "quantity": 2}})
    run(lake, TABLES[:2])
    for file in older:
        file.unlink()
    with pytest.raises(duckdb.IOException):
        run(open_lake(lake.settings, Run("test", "another process")), TABLES[2:])
    run(lake, TABLES[2:])
    found = query(
        lake, "SELECT status, quantity FROM billing.subscription_history WHERE subscription_id = 'sub_1' ORDER BY valid_from"
    )
    assert found.to_pylist() == [{"status": "incomplete", "quantity": 2}, {"status": "trialing", "quantity": 2}]


def test_without_heads_at_the_right_positions_all_versions_are_read_and_nothing_changes(lake: Lake) -> None:
    """Heads that lag behind, as after a crash between two tables, are no reason to be wrong."""
    late = {"id": "evt_3", "at": "2026-01-03T10:00:00Z", "subscription": {"status": "active"}}
    feed_stripe(lake, late)
    run(lake, TABLES[:1])
    feed_stripe(lake, late, {"id": "evt_5", "at": "2026-01-05T10:00:00Z", "subscription": {"status": "past_due"}})
    run(lake, TABLES[:1])
    run(lake, TABLES)
    found = query(lake, "SELECT status FROM billing.subscription_history WHERE subscription_id = 'sub_1' ORDER BY valid_from")
    assert found.column("status").to_pylist() == ["trialing", "active", "past_due"]
    assert query(lake, "SELECT count(*) AS n FROM billing.event_versions").column("n").to_pylist() == [4]
