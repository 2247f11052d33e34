"""Marts built by periods: whatever comes in whatever batches, they hold what a rebuild would, and little is computed again."""

from __future__ import annotations

import shutil
from bisect import bisect_left
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import polars as pl

from lakehouse.commit import COMPACTION, Change, commit
from lakehouse.completeness import complete_until
from lakehouse.lake import Lake, Run, history, open_lake, snapshot_inputs
from lakehouse.maintenance.compact import merge_files
from lakehouse.queries import bind_table, connect
from lakehouse.runner import Report, run
from lakehouse.settings import ROOT, Settings
from lakehouse.transforms import Inputs, load_transforms, upstream
from simulator.world import World, WorldConfig, build_world
from tests.feed import feed_crm_rows, feed_memberships, feed_payloads, feed_stripe, feed_webhooks, rows


def make(path: Path) -> Lake:
    return open_lake(Settings(home=path), Run("test", "test"))


def by_periods(lake: Lake) -> list[str]:
    return [name for name, declared in lake.declarations.items() if declared.build.mode == "periods"]


def needed(lake: Lake, names: list[str]) -> list[str]:
    """The tables named and all that they are made from."""
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name in transforms and name not in found:
            found.add(name)
            left += upstream(lake.declaration(name), transforms[name])
    return sorted(found)


def rebuilt(lake: Lake, name: str) -> pl.DataFrame:
    """What the transform makes of its whole inputs as they are now."""
    declared = lake.declaration(name)
    transform = load_transforms(lake.settings.transforms_dir, lake.declarations)[name]
    known = {"complete_until": complete_until(lake, declared, lake.vector(name))}
    with connect(lake.settings) as connection:
        for source in transform.inputs:
            table = lake.open_for_write(source)
            current = table.current_snapshot()
            bind_table(connection, source, table, current.snapshot_id if current else None)
        made = pl.DataFrame(transform.build(Inputs(connection, lake.settings.catalog_dir, known)).rows)
    return made.select(declared.column_names).sort(declared.primary_key)


def assert_same_as_rebuilt(lake: Lake) -> None:
    for name in by_periods(lake):
        declared = lake.declaration(name)
        held = pl.DataFrame(lake.load(name).scan().to_arrow()).select(declared.column_names).sort(declared.primary_key)
        made = rebuilt(lake, name)
        assert held.equals(made.cast(held.schema)), (
            name,
            held.join(made, on=declared.column_names, how="anti", nulls_equal=True),
        )  # type: ignore[arg-type]


def feed(lake: Lake, world: World, upto: dict[str, tuple[datetime, datetime]]) -> None:
    """What a world sends between two times, source by source."""
    first, last = (t.timestamp() for t in upto["stripe"])
    times = [d.deliver_at for d in world.stripe_deliveries]
    due = world.stripe_deliveries[bisect_left(times, first) : bisect_left(times, last)]
    feed_webhooks(lake, [d.body for d in due], [datetime.fromtimestamp(d.deliver_at, UTC) for d in due])
    first, last = upto["crm"][0].timestamp(), upto["crm"][1].timestamp()
    feed_crm_rows(lake, [c for c in world.crm_changes if first <= c.visible_at.timestamp() < last])
    feed_memberships(lake, [c for c in world.membership_changes if first <= c.visible_at.timestamp() < last])
    for table in world.product_records.slices(*(round(t.timestamp() * 1000) for t in upto["product"])):
        received = [datetime.fromtimestamp(ms / 1000, UTC) for ms in table["received_at"].to_pylist()]
        feed_payloads(lake, table["payload"].to_pylist(), received)


def test_any_batches_give_what_a_rebuild_gives(tmp_path: Path) -> None:
    written = play(tmp_path, 1, customers=25, days=35, events=1_000, batches=3)
    for name, (computed, held) in written.items():
        if name.removeprefix("marts.") in ("workspace_engagement_daily", "revenue_daily", "upgrade_exposures"):
            assert 0 < computed < held * 0.8, name  # and not by building all of it each time


def play(home: Path, seed: int, *, customers: int, days: int, events: int, batches: int) -> dict[str, tuple[int, int]]:
    """Feed a world in batches, compare each mart after each; how many rows of it the last batch computed, and how many it has.

    The sources come apart, so that what one learns late repairs what the other had.
    """
    rng = Random(seed)
    world = build_world(WorldConfig(seed=seed, customers=customers, days=days, product_events=events))
    lake = make(home)
    reached = dict.fromkeys(("stripe", "crm", "product"), world.start)
    reports: list[Report] = []
    for batch in range(1, batches + 1):
        goal = world.start + (world.end - world.start) * batch / batches
        ends = {s: goal if batch == batches else max(at, goal - timedelta(days=rng.uniform(0, 8))) for s, at in reached.items()}
        feed(lake, world, {source: (reached[source], ends[source]) for source in reached})
        reached = ends
        reports = run(lake, needed(lake, by_periods(lake)))
        assert_same_as_rebuilt(lake)
    return {r.table: (r.rows, lake.load(r.table).scan().count()) for r in reports if r.table in by_periods(lake)}


SALES = [
    {"id": f"evt_{n}", "type": "charge.succeeded", "at": f"2026-01-{n}T10:00:00Z", "charge": {"id": f"ch_{n}", "amount": 1000}}
    for n in range(10, 20)
]
REFUND = {"charge": "ch_12", "amount": 400}
REVENUE, MRR = "marts.revenue_daily", "marts.mrr_movements"


def build(lake: Lake, name: str) -> Report:
    """Build a mart and all below it; what was done for the mart."""
    (report,) = [r for r in run(lake, needed(lake, [name])) if r.table == name]
    return report


def revenue(lake: Lake) -> dict[str, tuple[int, int]]:
    """(booked, restated) net of each day."""
    found = rows(lake, "SELECT revenue_date, booked_net_minor AS booked, restated_net_minor AS restated FROM marts.revenue_daily")
    return {str(row["revenue_date"]): (row["booked"], row["restated"]) for row in found}


def test_a_late_refund_moves_restated_revenue_and_leaves_booked_days_alone(tmp_path: Path) -> None:
    """The example of docs/metrics.md; of the days two are computed again: the sale's and the refund's."""
    lake = make(tmp_path)
    feed_stripe(lake, *SALES)
    assert build(lake, REVENUE).rows == len(SALES)
    before = revenue(lake)
    assert before["2026-01-12"] == (1000, 1000)
    feed_stripe(lake, {"id": "evt_r", "type": "refund.created", "at": "2026-03-05T10:00:00Z", "refund": REFUND})
    report = build(lake, REVENUE)
    assert revenue(lake) == before | {"2026-01-12": (1000, 600), "2026-03-05": (-400, 0)}
    assert (report.new_input_rows, report.rows) == (1, 2)
    # a price says nothing of days: what depends on it is computed again whole
    price = {"id": "price_x", "object": "price", "currency": "usd", "product": "prod_x", "unit_amount": 1, "active": True}
    feed_stripe(lake, {"id": "evt_p", "type": "price.created", "at": "2026-03-06T00:00:00Z", "object": price})
    assert build(lake, REVENUE).rows == len(SALES) + 1


def subscribed(month: int) -> dict[str, object]:
    """A customer's first MRR, in a month of 2026."""
    return {
        "id": f"evt_{month}",
        "type": "customer.subscription.created",
        "at": f"2026-{month:02d}-10T00:00:00Z",
        "subscription": {"id": f"sub_{month}", "customer": f"cus_{month}"},
    }


def files(lake: Lake) -> set[str]:
    return {task.file.file_path for task in lake.load(MRR).scan().plan_files()}


def test_without_a_change_no_file_is_written(tmp_path: Path) -> None:
    lake = make(tmp_path)
    feed_stripe(lake, subscribed(1))
    build(lake, MRR)
    before = files(lake)
    customer = {"id": "cus_x", "object": "customer"}
    feed_stripe(lake, {"id": "evt_c", "type": "customer.created", "at": "2026-01-11T00:00:00Z", "object": customer})
    report = build(lake, MRR)
    assert (report.rows, report.files_added, report.files_removed) == (0, 0, 0)
    assert report.snapshot_id is not None  # the positions have moved
    assert files(lake) == before
    assert build(lake, MRR).snapshot_id is None


def test_a_compacted_input_touches_nothing_and_a_compacted_mart_goes_on(tmp_path: Path) -> None:
    lake = make(tmp_path)
    for month in (1, 2, 3, 4):
        feed_stripe(lake, subscribed(month))
        build(lake, MRR)
    at_once = replace(lake, settings=lake.settings.model_copy(update={"compact_cold_minutes": 0, "compact_days": 10_000}))
    table = lake.load("billing.mrr_movements")
    live = [task.file for task in table.scan().plan_files()]
    assert len(live) > 1
    merged = merge_files(at_once, lake.declaration("billing.mrr_movements"), table, live)
    note = {"kind": COMPACTION}
    commit(
        table,
        lake.run,
        Change("billing.mrr_movements", {}, {}, add=merged, remove=live, rewrite=True, scope=frozenset(), note=note),
    )
    feed_stripe(lake, subscribed(5))
    assert build(lake, MRR).rows == 2  # the fifth month, and the fourth, which is complete now
    assert lake.load(MRR).scan().count() == 5


def test_when_the_inputs_of_before_have_expired_it_is_built_whole(tmp_path: Path) -> None:
    lake = make(tmp_path)
    feed_stripe(lake, subscribed(1), subscribed(2))
    build(lake, MRR)
    made_from = snapshot_inputs(history(lake.load(MRR))[0])["billing.mrr_movements"]
    feed_stripe(lake, subscribed(3))
    run(lake, [name for name in needed(lake, [MRR]) if name != MRR])
    lake.load("billing.mrr_movements").maintenance.expire_snapshots().by_id(made_from).commit()
    assert build(lake, MRR).rows == 3
    feed_stripe(lake, subscribed(4))
    assert build(lake, MRR).rows == 2  # the fourth month, and the third, which is complete now


def test_what_other_code_has_made_is_built_whole(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "transforms", tmp_path / "transforms", ignore=shutil.ignore_patterns("__pycache__"))
    settings = Settings(home=tmp_path / "home", transforms_dir=tmp_path / "transforms")
    feed_stripe(open_lake(settings), subscribed(1), subscribed(2))
    build(open_lake(settings), MRR)
    code = tmp_path / "transforms" / "marts" / "mrr_movements.sql"
    code.write_text(code.read_text("utf-8").replace("'unknown'", "'none of ours'"), "utf-8")
    feed_stripe(open_lake(settings), subscribed(3))
    assert build(open_lake(settings), MRR).rows == 3
