"""`lakehouse maintain`, `tag` and `untag` as a user types them, over the small lake; and the benchmark of commits, tiny."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from command import Ran

from benchmarks.commits import one_run
from lakehouse.append import append_rows
from lakehouse.lake import Lake

TABLE = "raw.records"
Call = Callable[..., Ran]


@pytest.fixture
def ask(call: Call, lake: Lake) -> Call:
    """A command over a lake whose raw table has 40 commits; nothing waits for its age."""
    for i in range(40):
        at = pa.array([datetime(2026, 3, 1, tzinfo=UTC)], pa.timestamp("us", "UTC"))
        row = {"topic": ["t"], "partition": pa.array([0], pa.int32()), "offset": [i], "received_at": at, "value": ["v"]}
        append_rows(lake, TABLE, pa.table(row), {("t", 0): i}, {("t", 0): i + 1})
    settings = {
        "LAKEHOUSE_HOME": str(lake.settings.home),
        "LAKEHOUSE_CATALOG_DIR": str(lake.settings.catalog_dir),
        "LAKEHOUSE_EXPIRED_FILES_HOURS": "0",
        "COLUMNS": "200",
    }
    return lambda *arguments: call(*arguments, **settings)


def test_it_says_what_it_would_do_does_it_and_then_finds_nothing(ask: Call) -> None:
    rows = ask("sql", f"SELECT count(*) AS n FROM {TABLE}", "--json").fine().json
    planned = {r["step"]: r["figures"] for r in ask("maintain", TABLE, "--dry-run", "--json").fine().json}
    assert planned["expire"]["snapshots"] == 10  # of 40 the newest 30 are kept
    assert "10 snapshots" in ask("maintain", TABLE, "--dry-run").fine().out
    done = {r["step"]: r for r in ask("maintain", TABLE, "--json").fine().json}
    assert {r["problem"] for r in done.values()} == {None}
    assert done["expire"]["figures"]["snapshots"] >= 10
    assert done["expire"]["figures"]["files_removed"] >= 10
    assert ask("sql", f"SELECT count(*) AS n FROM {TABLE}", "--json").fine().json == rows
    assert "the tables are healthy" in ask("maintain", TABLE).fine().out
    ask("maintain", TABLE, "--only", "everything").failed(2, "'expire'")
    ask("maintain", "billing.things").failed(2, "holds nothing yet")


def test_a_tag_pins_a_snapshot_until_it_is_removed(ask: Call, lake: Lake) -> None:
    oldest = min(lake.load(TABLE).snapshots(), key=lambda s: s.sequence_number or 0).snapshot_id
    assert ask("tag", TABLE, "report-1", "--snapshot", str(oldest), "--json").fine().json["snapshot_id"] == oldest
    ask("tag", TABLE, "report-1").failed(2, "report-1 names snapshot")
    ask("tag", TABLE, "report-2", "--snapshot", "17").failed(2, "no snapshot 17", "lakehouse show")
    ask("maintain", TABLE).fine()
    told = ask("sql", f"SELECT count(*) AS n FROM {TABLE}", "--as-of", str(oldest), "--json").fine().json
    assert told == [{"n": 1}]
    ask("untag", TABLE, "report-1").fine()
    ask("untag", TABLE, "report-1").failed(2, "it has: none")


def test_a_table_that_cannot_be_kept_is_told_and_the_others_are(ask: Call, lake: Lake) -> None:
    table = lake.load(TABLE)
    table.manage_snapshots().set_current_snapshot(table.snapshots()[3].snapshot_id).commit()
    told = ask("maintain", TABLE, "--only", "expire")
    assert (told.code, "lakehouse rollback raw.records" in told.err) == (1, True)


def test_the_benchmark_of_commits_runs() -> None:
    figures = one_run(0.0001, lambda _: None)
    assert figures["commits"] == 100
    assert figures["snapshots"] <= 60
    assert figures["ms_at_5000"] > 0
