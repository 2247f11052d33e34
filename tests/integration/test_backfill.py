"""A backfilled window holds what its inputs give, whatever was there before, and however often it was stopped and run again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from lakehouse import backfill as module
from lakehouse.backfill import Slice, backfill
from lakehouse.errors import Terminal, UsageError
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.reproduce import record_of
from lakehouse.runner import run
from lakehouse.settings import ROOT, Settings
from lakehouse.transforms import load_transforms, with_inputs
from tests.feed import feed_crm, feed_product, feed_stripe, rewritten, rows

EVENTS, RAW = "product.events", "raw.product_events"

TABLES = (
    "billing.event_versions",
    "billing.object_heads",
    "billing.subscription_history",
    "billing.revenue_ledger",
    "billing.workspace_customer_history",
    "billing.plan_timeline",
    EVENTS,
    "marts.workspace_engagement_daily",
)
START, END = datetime(2026, 1, 3, tzinfo=UTC), datetime(2026, 1, 9, tzinfo=UTC)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home: two rounds in small batches, with copies, what comes late, and what cannot be used."""
    home = tmp_path_factory.mktemp("lake") / "home"
    lake = open_lake(Settings(home=home, batch_rows=9), Run("test", "test"))
    for number, (day, price) in enumerate((("05", "starter"), ("03", "pro"))):
        at = f"2026-01-{day}T00:00:00Z"
        feed_stripe(lake, {"id": f"evt_{day}", "at": at, "subscription": {"price": price}})
        feed_crm(lake, (f"ws_{number}", "cus_1", "2025-01-01T00:00:00Z", at))
        feed_product(
            lake,
            *(
                {
                    "event_id": f"e{n}",
                    "workspace_id": f"ws_{n % 3}",
                    "occurred_at": f"2026-01-0{1 + n}T12:00:00Z",
                    "colour": "red",
                }
                for n in range(9)
            ),
            {"event_id": f"late{number}", "workspace_id": "ws_1", "occurred_at": "2026-01-04T23:59:59.999Z"},
            b"never json",
            received=f"2026-01-1{number}T12:00:00Z",
        )
        run(lake, with_inputs(TABLES, lake.declarations, load_transforms(lake.settings.transforms_dir, lake.declarations)))
    return home


@pytest.fixture
def lake(filled: Path, tmp_path: Path) -> Iterator[Lake]:
    """The lake, put back as it was after the test."""
    lake = open_lake(Settings(home=filled, batch_rows=9), Run("test", "test"))
    before = {name: lake.load(name).metadata_location for name in (EVENTS, RAW)}
    yield lake
    for name, location in before.items():
        lake.catalog.drop_table(name)
        lake.catalog.register_table(name, location)
    shutil.rmtree(filled / "backfills", ignore_errors=True)


def events(lake: Lake) -> tuple[int, str]:
    record = record_of(lake, EVENTS)
    return record.rows, record.hash


in_window = (pl.col("occurred_at") >= START) & (pl.col("occurred_at") < END)
DAMAGE = {
    "rows_lost": lambda r: r.filter(~in_window),
    "rows_forged": lambda r: r.with_columns(plan=pl.when(in_window).then(pl.lit("enterprise")).otherwise("plan")),
    "rows_doubled": lambda r: pl.concat([r, r.filter(in_window).with_columns(event_id=pl.col("event_id") + "x")]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_window_is_what_its_inputs_give_whatever_was_there(lake: Lake, damage: str) -> None:
    right = events(lake)
    rewritten(lake, EVENTS, DAMAGE[damage])
    assert events(lake) != right
    made = list(backfill(lake, START, END, [EVENTS]))
    assert events(lake) == right
    assert sum(s.changed for s in made) == 8  # e2 to e7, and two that came late
    assert [(s.start.day, s.rows) for s in made] == [(3, 1), (4, 3), (5, 1), (6, 1), (7, 1), (8, 1)]
    again = list(backfill(lake, START, END, [EVENTS]))
    assert [s.snapshot_id for s in again] == [None] * 6
    assert [s.hash for s in again] == [s.hash for s in made]


def test_of_what_lies_outside_the_window_nothing_changes(lake: Lake) -> None:
    rewritten(lake, EVENTS, lambda r: r.with_columns(plan=pl.lit("enterprise")))
    list(backfill(lake, START, END, [EVENTS], slice_days=4))
    found = rows(lake, f"SELECT count(*) FILTER (WHERE plan = 'enterprise') AS wrong, count(*) AS n FROM {EVENTS}")
    assert found == [{"wrong": 3, "n": 11}]  # e0, e1 and e8


def test_killed_and_run_again_it_goes_on(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    right = events(lake)
    rewritten(lake, EVENTS, DAMAGE["rows_forged"])
    derived: list[int] = []
    real = module.derive_slice

    def derive(lake: Lake, name: str, start: datetime, end: datetime) -> Slice:
        if len(derived) == 3:
            raise KeyboardInterrupt
        derived.append(start.day)
        return real(lake, name, start, end)

    monkeypatch.setattr(module, "derive_slice", derive)
    with pytest.raises(KeyboardInterrupt):
        list(backfill(lake, START, END, [EVENTS]))
    assert events(lake) != right
    derived.insert(0, 0)  # past the failure
    # what was done is not done again, but for what somebody has touched since
    rewritten(lake, EVENTS, lambda r: r.filter(pl.col("event_id") != "e3"))
    made = list(backfill(lake, START, END, [EVENTS]))
    assert derived == [0, 3, 4, 5, 4, 6, 7, 8]
    assert len(made) == 6
    assert events(lake) == right


def test_slices_are_made_side_by_side(lake: Lake) -> None:
    right = events(lake)
    rewritten(lake, EVENTS, DAMAGE["rows_lost"])
    made = list(backfill(lake, START, END, [EVENTS], slice_days=3, parallel=2))
    assert (len(made), events(lake)) == (2, right)


def test_every_table_is_as_it_was(lake: Lake) -> None:
    """By keys, by days and whole: nothing was wrong, so nothing changes."""
    before = {n: record_of(lake, n).hash for n in TABLES}
    list(backfill(lake, datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 13, tzinfo=UTC), TABLES, slice_days=12))
    assert {n: record_of(lake, n).hash for n in TABLES} == before


def test_a_column_newly_declared_is_filled(lake: Lake, tmp_path: Path) -> None:
    """A field that nobody knew was kept in `extra`; declared, it is taken out of it, for the days asked for."""
    catalog = tmp_path / "catalog"
    shutil.copytree(ROOT / "catalog", catalog)
    path = catalog / "product" / "events.yaml"
    text = path.read_text("utf-8")
    column = "  - {name: colour, type: string, pii: none, doc: colour}\n"
    path.write_text(text.replace("columns:\n", f"columns:\n{column}", 1), "utf-8")
    promoted = open_lake(Settings(home=lake.settings.home, batch_rows=9, catalog_dir=catalog), Run("test", "test"))
    list(backfill(promoted, START, END, [EVENTS]))
    found = rows(promoted, f"SELECT event_id, colour, extra FROM {EVENTS} ORDER BY event_id")
    extra = '{"colour":"red"}'
    assert [(r["event_id"], r["colour"], r["extra"]) for r in found] == [
        *((f"e{n}", None, extra) for n in (0, 1)),
        *((f"e{n}", "red", None) for n in range(2, 8)),
        ("e8", None, extra),
        ("late0", None, None),
        ("late1", None, None),
    ]


def test_what_raw_no_longer_holds_is_left_as_it_is(lake: Lake) -> None:
    right = events(lake)
    rewritten(lake, RAW, lambda r: r.head(0))
    with pytest.raises(Terminal, match=r"1 rows of the window come from records that raw\.product_events no longer holds"):
        list(backfill(lake, START, END, [EVENTS]))
    assert events(lake) == right


def test_what_cannot_be_asked_for(lake: Lake) -> None:
    for start, end in ((END, START), (START, END.replace(hour=1))):
        with pytest.raises(UsageError, match="whole UTC days"):
            list(backfill(lake, start, end))
    with pytest.raises(UsageError, match=r"raw\.product_events has no transform"):
        list(backfill(lake, START, END, [RAW]))
