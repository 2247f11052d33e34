"""The truth of the marts: the SQL says the same of other worlds than the demo's, and a wrong cell is found and told."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pytest

from lakehouse.declarations import load_declarations
from lakehouse.in_memory import build_tables
from lakehouse.settings import load_settings
from simulator.cells import compare
from simulator.events import first_received
from simulator.marts import KEYS, _events, funnel, marts
from simulator.truth import write_truth
from simulator.verify import compare_marts
from simulator.world import World, WorldConfig, build_world
from tests.cases.test_cases import table_of

MARTS = [f"marts.{name}" for name in (*KEYS, "upgrade_funnel")]


def built(world: World, received_until: datetime) -> dict[str, pa.Table]:
    """The marts of a world whose product events were attributed as they truly are, by the transforms alone."""
    settings = load_settings()
    declarations = load_declarations(settings.catalog_dir)
    received = first_received(world.stripe_deliveries)
    bodies = {d.event_id: d.body for d in world.stripe_deliveries}
    stripe = [
        {"topic": "stripe", "partition": 0, "offset": n, "payload": bodies[event], "source": "webhook", "headers": []}
        | {"received_at": datetime.fromtimestamp(at, UTC)}
        for n, (event, at) in enumerate(received.items())
    ]
    events = _events(world)
    measures = world.product_records.measures(events).to_dicts()
    product = events.with_columns(
        event_id=world.product_records.event_ids(events),
        occurred_at=(pl.col("occurred_at") * 1000).cast(pl.Datetime("us", "UTC")),
        user_id=pl.col("user").cast(pl.String),
        workspace_id=pl.when("sent").then("workspace_id"),
        session_id=pl.col("session").struct.json_encode(),
        attribution="outcome",
        account=pl.lit("platform"),
        properties=pl.Series([json.dumps(m) for m in measures]),
    )
    given = {
        "raw.stripe_events": table_of(declarations["raw.stripe_events"], stripe),
        "product.events": table_of(declarations["product.events"], product.to_dicts()),
    }
    last = (received_until - timedelta(days=10)).date() - timedelta(days=1)
    return {name: t.rows for name, t in build_tables(settings, given, MARTS, {"complete_until": last}).items()}


@pytest.mark.parametrize("seed", [1, 2])
def test_the_sql_says_what_is_true(seed: int, tmp_path: Path) -> None:
    world = build_world(WorldConfig(seed=seed, customers=120, days=45, product_events=4_000))
    write_truth(world, tmp_path)
    told = json.loads((tmp_path / "truth.json").read_text())
    tables = built(world, datetime.fromisoformat(told["product_events"]["received_until"]))
    with duckdb.connect() as connection:
        connection.execute("CREATE SCHEMA marts")
        for name, rows in tables.items():
            connection.register(name.replace(".", "_"), rows)
            connection.execute(f"CREATE VIEW {name} AS FROM {name.replace('.', '_')}")
        compared = compare_marts(tmp_path, told, lambda text: connection.execute(text).to_arrow_table())
    assert sorted(compared) == sorted(MARTS)
    assert {name: c.examples for name, c in compared.items() if c.wrong} == {}
    assert all(c.rows for c in compared.values())


def test_a_wrong_cell_is_told() -> None:
    key = ["day"]
    true = pl.DataFrame({"day": [1, 2, 3], "amount": [10, 20, None], "rate": [0.1, 0.2, 0.3]})
    assert compare(true, true.sample(fraction=1, shuffle=True, seed=1), key).wrong == 0
    assert compare(true, true.with_columns(pl.col("rate") + 1e-12), key).wrong == 0
    stored = pl.DataFrame({"day": [2, 3, 3, 4], "amount": [21, 0, 0, 1], "rate": [0.2, 0.3, 0.3, 0.4]})
    found = compare(true, stored, key)
    assert (found.rows, found.stored, found.wrong) == (3, 4, 5)
    assert found.examples == ("day=1: missing", "day=2: amount is 21, truly 20", "day=3: amount is 0, truly None")
    assert compare(true, pl.concat([true, true.head(1)]), key).examples == ("day=1: stored more than once",)


def test_what_only_withheld_events_tell_is_booked_on_no_day(world: World) -> None:
    tellers = {e.id for e in world.stripe_events if e.object_type == "refund" or e.type.startswith("charge.refunded")}
    full, without = marts(world)["revenue_daily"], marts(world, tellers)["revenue_daily"]
    assert full["booked_refunds_minor"].sum() < 0 == without["booked_refunds_minor"].sum()
    assert full["restated_net_minor"].sum() == without["restated_net_minor"].sum()


def test_a_refund_known_late_is_booked_on_an_open_day(world: World) -> None:
    """Over the whole world both readings have the same sum, and no day before a refund carries it in the books."""
    revenue = marts(world)["revenue_daily"]
    for measure in ("gross", "refunds", "disputes", "fees", "net", "billed"):
        assert revenue[f"booked_{measure}_minor"].sum() == revenue[f"restated_{measure}_minor"].sum() != 0
    differ = revenue.filter(pl.col("booked_refunds_minor") != pl.col("restated_refunds_minor"))
    assert differ.height > 10


def test_the_funnel_counts_days_up_to_the_last_one_that_is_over() -> None:
    columns = {"plan": "pro", "exposed_customers": 20, "upgraded_customers": 5}
    rows = [
        {"feature": feature, "exposure_date": date(2026, 1, day)} | columns for day in (1, 2, 3) for feature in ("sso", "(any)")
    ]
    (row,) = funnel(pl.DataFrame(rows), date(2026, 1, 2)).to_dicts()
    assert (row["exposed_customer_days"], row["upgraded_customer_days"], row["last_date"]) == (40, 10, date(2026, 1, 2))
    assert (row["lift"], row["odds_ratio"], row["supported"]) == (1.0, None, True)
    assert funnel(pl.DataFrame(rows), date.min).is_empty()
