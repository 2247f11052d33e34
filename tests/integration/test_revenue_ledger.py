"""billing.revenue_ledger on a real lake: batches only append, late receipts, the three readings, MRR."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import pytest

from lakehouse.errors import UsageError
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.ledger import known_until, ledger_rule, read
from lakehouse.queries import bind_arrow, connect, query
from lakehouse.runner import run
from lakehouse.settings import Settings
from lakehouse.transforms import Inputs
from tests.feed import feed_stripe, rows
from transforms.billing import revenue_ledger

BUILT = ["billing.event_versions", "billing.revenue_ledger"]
LEDGER = "billing.revenue_ledger"

SALE = {"id": "evt_1", "type": "charge.succeeded", "at": "2026-01-10T10:00:00Z", "charge": {"amount": 1000}}
OTHER_SALE = {"id": "evt_2", "type": "charge.succeeded", "at": "2026-01-20T10:00:00Z", "charge": {"id": "ch_2", "amount": 500}}
REFUND = {"id": "evt_3", "type": "refund.created", "at": "2026-03-05T10:00:00Z", "refund": {"id": "re_1", "amount": 400}}
NEWER_SALE = {"id": "evt_4", "type": "charge.succeeded", "at": "2026-03-20T10:00:00Z", "charge": {"id": "ch_3", "amount": 70}}


def make(path: Path) -> Lake:
    return open_lake(Settings(home=path), Run("test", "test"))


def entries(lake: Lake) -> pl.DataFrame:
    return pl.DataFrame(query(lake, f"SELECT * FROM {LEDGER}")).sort("account", "entry_id")


def rebuilt(lake: Lake) -> pl.DataFrame:
    """What the same function makes of all versions at once, in memory."""
    versions = query(lake, "SELECT * FROM billing.event_versions")
    with connect(lake.settings) as connection:
        bind_arrow(connection, "billing.event_versions", versions)
        found = pl.DataFrame(revenue_ledger.build(Inputs(connection, lake.settings.catalog_dir)))
    return found.sort("account", "entry_id")


def live_paths(lake: Lake) -> set[str]:
    return {t.file.file_path for t in lake.load(LEDGER).scan().plan_files()}


def same(left: pl.DataFrame, right: pl.DataFrame) -> bool:
    return left.equals(right.select(left.columns).cast(left.schema))  # type: ignore[arg-type]


def test_a_batch_only_adds_files_and_again_adds_nothing(tmp_path: Path) -> None:
    lake = make(tmp_path)
    before: set[str] = set()
    for event in (SALE, OTHER_SALE, REFUND, NEWER_SALE):
        feed_stripe(lake, event)
        run(lake, BUILT)
        assert before < live_paths(lake), "a file that was there is gone"
        before = live_paths(lake)
        run(lake, BUILT)
        assert live_paths(lake) == before
    assert same(entries(lake), rebuilt(lake))


def test_an_older_receipt_in_a_later_batch_gives_what_a_rebuild_gives(tmp_path: Path) -> None:
    lake = make(tmp_path)
    feed_stripe(lake, SALE, REFUND)
    run(lake, BUILT)
    assert entries(lake)["effective_at"].null_count() == 0
    # received before the refund, and yet in a later batch: the refund was never without its charge
    early = {"id": "evt_0", "type": "refund.created", "at": "2026-01-12T10:00:00Z", "refund": {"id": "re_0", "amount": 10}}
    feed_stripe(lake, early)
    run(lake, BUILT)
    assert same(entries(lake), rebuilt(lake))
    # and one that had no charge when it was posted
    feed_stripe(lake, {**REFUND, "id": "evt_8", "refund": {"id": "re_8", "charge": "ch_8", "amount": 5}})
    run(lake, BUILT)
    feed_stripe(lake, {**SALE, "id": "evt_9", "charge": {"id": "ch_8", "amount": 50}})
    run(lake, BUILT)
    assert entries(lake).filter(pl.col("object_id") == "re_8")["reverses"].null_count() == 1
    assert same(entries(lake), rebuilt(lake))


@pytest.mark.parametrize("seed", range(3))
def test_any_split_into_batches_and_any_order_is_the_rebuild(tmp_path: Path, seed: int) -> None:
    rng = Random(seed)
    events: list[dict[str, Any]] = []
    for n in range(8):
        made = datetime(2026, 1, 1 + n, tzinfo=UTC)
        amount, refund = rng.randrange(100, 900), rng.randrange(1, 100)
        told = {"id": f"ch_{n}", "amount": amount, "made": made.isoformat()}

        def event(number: int, kind: str, days: float, made: datetime = made, n: int = n, **body: Any) -> dict[str, Any]:
            at = made + timedelta(days=days)
            received = at + timedelta(hours=rng.choice((0, 0, 1, 30, 100)))
            return {"id": f"evt_{n}_{number}", "type": kind, "at": at.isoformat(), "received": received.isoformat(), **body}

        events += [
            event(0, "charge.succeeded", 0, charge=told),
            event(1, "refund.created", 5, refund={"id": f"re_{n}", "charge": f"ch_{n}", "amount": refund}),
            event(2, "charge.refunded", 5, charge={**told, "refunded": refund}),
            event(3, "invoice.finalized", 0, invoice={"id": f"in_{n}", "finalized": made.isoformat()}),
        ]
    rng.shuffle(events)
    lake = make(tmp_path)
    while events:
        size = rng.randrange(1, 9)
        feed_stripe(lake, *events[:size], *rng.sample(events[:size], 1))  # one of them twice
        del events[:size]
        run(lake, BUILT)
    assert same(entries(lake), rebuilt(lake))


def test_three_readings_of_a_month_before_and_after_a_late_refund(tmp_path: Path) -> None:
    lake = make(tmp_path)

    def month(reading: str, **options: Any) -> int:
        found = read(lake, reading, basis="cash", month=(2026, 1), **options)["rows"]  # type: ignore[arg-type]
        return sum(row["amount_minor"] for row in found)

    feed_stripe(lake, SALE, OTHER_SALE, {**NEWER_SALE, "id": "evt_5", "at": "2026-02-10T10:00:00Z", "charge": {"id": "ch_4"}})
    run(lake, BUILT)
    assert month("booked") == month("restated") == 1500
    assert read(lake, "booked", month=(2026, 1))["rows"][0]["closed"]
    feed_stripe(lake, REFUND, NEWER_SALE)
    run(lake, BUILT)
    assert month("booked") == 1500, "a closed month moved"
    assert month("restated") == 1100
    assert month("as-known", at=datetime(2026, 2, 1, tzinfo=UTC)) == 1500
    assert month("as-known", at=datetime(2026, 3, 6, tzinfo=UTC)) == 1100
    march = read(lake, "booked", basis="cash", month=(2026, 3), grain="type")["rows"]
    assert [(r["entry_type"], r["amount_minor"], r["closed"]) for r in march] == [("charge", 70, False), ("refund", -400, False)]


def test_a_time_beyond_what_is_known_is_refused(tmp_path: Path) -> None:
    lake = make(tmp_path)
    with pytest.raises(UsageError, match="holds nothing yet"):
        read(lake, "booked")
    feed_stripe(lake, SALE)
    run(lake, BUILT)
    known = known_until(lake, ledger_rule(lake))
    assert known == datetime(2026, 1, 10, 9, 58, tzinfo=UTC)
    read(lake, "as-known", at=known)
    with pytest.raises(UsageError, match="later than what the books know"):
        read(lake, "as-known", at=known + timedelta(seconds=1))
    with pytest.raises(UsageError, match="as known when"):
        read(lake, "as-known")
    # what raw holds and the books have not taken up is not known
    feed_stripe(lake, OTHER_SALE)
    assert known_until(lake, ledger_rule(lake)) == known


def test_each_entry_leads_to_its_event_and_back(tmp_path: Path) -> None:
    lake = make(tmp_path)
    feed_stripe(lake, SALE, OTHER_SALE, REFUND)
    run(lake, BUILT)
    found = rows(
        lake,
        f"SELECT e.entry_id, r.event_id FROM {LEDGER} e "
        'JOIN raw.stripe_events r ON r.topic = e.topic AND r.partition = e.partition AND r."offset" = e."offset" ORDER BY 1',
    )
    assert [(r["entry_id"], r["event_id"]) for r in found] == [
        ("charge/ch_1/1000/evt_1", "evt_1"),
        ("charge/ch_2/500/evt_2", "evt_2"),
        ("refund/re_1/evt_3", "evt_3"),
    ]


def test_no_step_compares_everything_with_everything(tmp_path: Path) -> None:
    """DuckDB joins by nested loops where one side of a condition of an outer join names both tables."""
    lake = make(tmp_path)
    feed_stripe(lake, SALE, REFUND)
    run(lake, BUILT)
    with connect(lake.settings) as connection:
        bind_arrow(connection, "billing.event_versions", query(lake, "SELECT * FROM billing.event_versions"))
        revenue_ledger.build(Inputs(connection, lake.settings.catalog_dir))
        statements = [*revenue_ledger.ORIGINS.split(";"), revenue_ledger.POSTINGS.read_text("utf-8"), revenue_ledger.ENTRIES]
        parameters = {"time_zone": "UTC", "close_after_hours": 24}
        for sql in statements:
            plan = str(connection.execute(f"EXPLAIN {sql}", parameters if "$time_zone" in sql else None).fetchall())
            assert "JOIN" in plan or "GROUP" in plan
            assert "NL_JOIN" not in plan
            assert "NESTED_LOOP" not in plan
