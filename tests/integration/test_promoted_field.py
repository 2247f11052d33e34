"""A field is promoted out of `extra` by declaring its column."""

from __future__ import annotations

import shutil
from pathlib import Path

from lakehouse.lake import Run, open_lake
from lakehouse.runner import run
from lakehouse.settings import Settings
from tests.feed import CLEAN, feed_product, rows

RECEIVED = "2026-01-10T12:00:05Z"


def test_a_declared_field_moves_from_extra_to_its_column(tmp_path: Path) -> None:
    feed = {"seats": 5, "arm": "B"}
    lake = open_lake(Settings(home=tmp_path), Run("test", "test"))
    feed_product(lake, {"event_id": "a"} | feed, received=RECEIVED)
    run(lake, CLEAN)
    catalog = tmp_path / "catalog"
    shutil.copytree(lake.settings.catalog_dir, catalog)
    declared = catalog / "product" / "events.yaml"
    column = '  - {name: seats, type: int, pii: none, doc: "seats"}\n'
    declared.write_text(declared.read_text("utf-8").replace("checks:\n", f"{column}checks:\n"), "utf-8")
    later = open_lake(Settings(home=tmp_path, catalog_dir=catalog), Run("test", "test"))
    feed_product(later, {"event_id": "b"} | feed, {"event_id": "c", "seats": "many"}, received=RECEIVED)
    run(later, CLEAN)
    found = rows(later, "SELECT event_id, seats, extra FROM product.events ORDER BY event_id")
    assert found == [
        {"event_id": "a", "seats": None, "extra": '{"seats":5,"arm":"B"}'},
        {"event_id": "b", "seats": 5, "extra": '{"arm":"B"}'},
    ]
    assert [r["reason"] for r in rows(later, "SELECT reason FROM ops.dead_letters")] == ["wrong_type_seats"]
