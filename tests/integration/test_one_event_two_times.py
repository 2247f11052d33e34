"""One event id that says two times, in two batches: one row, of the first receipt; the other is a conflict."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from lakehouse.builds import inserts
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
EARLIER, LATER = "2026-01-02T10:00:00Z", "2026-01-04T10:00:00Z"
CREATED: dict[str, Any] = {"id": "evt_1", "at": "2026-01-01T10:00:00Z", "subscription": {"status": "trialing"}}
LAST: dict[str, Any] = {"id": "evt_3", "at": "2026-01-05T10:00:00Z", "subscription": {"status": "canceled"}}


def copy(at: str, received: str) -> dict[str, Any]:
    return {"id": "evt_2", "at": at, "received": received, "subscription": {"status": "active", "quantity": 3}}


def intervals(lake: Lake) -> list[tuple[str, int, bool]]:
    found = query(
        lake, "SELECT status, valid_from, valid_to IS NULL AS open FROM billing.subscription_history ORDER BY valid_from"
    )
    return [(r["status"], r["valid_from"].day, r["open"]) for r in found.to_pylist()]


@pytest.mark.parametrize("first_at", [EARLIER, LATER])
@pytest.mark.parametrize("in_order", [True, False], ids=["first receipt first", "first receipt last"])
def test_the_first_receipt_counts_whichever_batch_brings_it(in_order: bool, first_at: str, tmp_path: Path) -> None:
    lake = open_lake(Settings(home=tmp_path), Run("test", "test"))
    other_at = LATER if first_at == EARLIER else EARLIER
    copies = [copy(first_at, "2026-01-06T00:00:00Z"), copy(other_at, "2026-01-07T00:00:00Z")]
    feed_stripe(lake, CREATED)
    run(lake, TABLES)
    for one in copies if in_order else copies[::-1]:
        feed_stripe(lake, one)
        run(lake, TABLES)
    day = datetime.fromisoformat(first_at).day
    rows = query(lake, "SELECT created_at, recorded_at FROM billing.event_versions WHERE event_id = 'evt_2'").to_pylist()
    assert [(r["created_at"].day, r["recorded_at"].day) for r in rows] == [(day, 6)]
    assert intervals(lake) == [("trialing", 1, False), ("active", day, True)]
    letters = query(lake, "SELECT reason, detail FROM ops.dead_letters").to_pylist()
    assert [(r["reason"], r["detail"]) for r in letters] == [
        ("conflicting_copy", "differs from the first receipt in: created_at")
    ]
    feed_stripe(lake, LAST)
    run(lake, TABLES)
    assert intervals(lake) == [("trialing", 1, False), ("active", day, False), ("canceled", 5, True)]


def test_the_same_time_again_in_a_later_batch_is_no_conflict(tmp_path: Path) -> None:
    lake = open_lake(Settings(home=tmp_path), Run("test", "test"))
    for batch in ([CREATED], [copy(EARLIER, EARLIER)], [copy(EARLIER, LATER), LAST]):
        feed_stripe(lake, *batch)
        run(lake, TABLES)
    assert intervals(lake) == [("trialing", 1, False), ("active", 2, False), ("canceled", 5, True)]
    assert not lake.exists("ops.dead_letters")


@pytest.mark.parametrize("indexed_rows", [1, 50_000], ids=["by the index", "by the names"])
def test_what_is_delivered_later_under_the_id_of_an_event_about_another_object_is_a_conflict(
    indexed_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inserts, "INDEXED_ROWS", indexed_rows)
    lake = open_lake(Settings(home=tmp_path), Run("test", "test"))
    again = {**CREATED, "received": "2026-01-08T00:00:00Z"}
    other = {**again, "subscription": {"id": "sub_2", "status": "active"}}
    for batch in ([CREATED], [again, LAST], [other]):
        feed_stripe(lake, *batch)
        run(lake, TABLES[:1])
    rows = query(lake, "SELECT event_id, object_id FROM billing.event_versions ORDER BY event_id").to_pylist()
    assert rows == [{"event_id": "evt_1", "object_id": "sub_1"}, {"event_id": "evt_3", "object_id": "sub_1"}]
    letters = query(lake, 'SELECT "offset", reason, detail FROM ops.dead_letters').to_pylist()
    assert letters == [{"offset": 3, "reason": "conflicting_copy", "detail": "differs from the first receipt in: object_id"}]
