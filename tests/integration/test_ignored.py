"""Stripe events of a kind that is not kept stay in raw and are counted: in `lakehouse status`, and as a metric."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from lakehouse.cli.explore import road, status
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.runner import run
from lakehouse.settings import Settings
from tests.feed import feed_stripe

TABLE = "billing.event_versions"


def moon(number: int) -> dict[str, object]:
    at = "2026-01-01T10:00:00Z"
    return {"id": f"evt_moon_{number}", "type": "moon.landed", "at": at, "object": {"object": "moon", "id": "m_1"}}


def counted(lake: Lake) -> tuple[int, float | None]:
    """What status and the metric say."""
    (row,) = [r for r in road(lake) if r["table"] == TABLE]
    return row["ignored"], REGISTRY.get_sample_value("lakehouse_ignored_records", {"table": TABLE})


def test_they_are_counted_once_each_batch_after_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = open_lake(Settings(home=tmp_path), Run("test", "test"))
    feed_stripe(lake, {"id": "evt_1", "at": "2026-01-01T10:00:00Z"}, moon(1), moon(2))
    run(lake, [TABLE])
    assert counted(lake) == (2, 2.0)
    feed_stripe(lake, {"id": "evt_2", "at": "2026-01-02T10:00:00Z"})
    run(lake, [TABLE])
    feed_stripe(lake, moon(3))
    run(lake, [TABLE])
    run(lake, [TABLE])
    assert counted(lake) == (3, 3.0)
    monkeypatch.setenv("LAKEHOUSE_HOME", str(tmp_path))
    status()
    assert f"ignored: 3 records of a kind that {TABLE} does not keep" in capsys.readouterr().out
