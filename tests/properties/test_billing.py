"""Billing is a function of the set of events: any order, repetition, split into batches and restart give the same rows.

Pure: 5,000 worlds, each in an account of its own, through the whole function at once. Full path: from raw tables through the
runner and the commit path, in random batches, by a process that starts anew between them; `make properties` runs many more.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from lakehouse import deletes
from lakehouse.append import append_rows
from lakehouse.builds import touched
from lakehouse.declarations import load_declarations
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.positions import vector_of
from lakehouse.queries import query
from lakehouse.runner import run
from lakehouse.settings import ROOT, Settings
from tests.properties.worlds import Delivery, as_rows, deliveries_of, redated, repeated
from transforms.pure import billing_tables

WORLDS, WORLDS_A_CALL = 5_000, 1_250
REDATED = 2
FULL_PATH = int(os.environ.get("PROPERTY_EXAMPLES", "25"))
DECLARED = load_declarations(ROOT / "catalog")
FULL_PATH_TABLES = (
    "billing.event_versions",
    "billing.object_heads",
    "billing.object_links",
    "billing.customers",
    "billing.subscriptions",
    "billing.subscription_items",
    "billing.charges",
    "billing.refunds",
    "billing.disputes",
    "billing.invoices",
    "billing.customer_history",
    "billing.subscription_history",
    "billing.subscription_item_history",
    "billing.plan_timeline",
    "billing.mrr_movements",
    "billing.revenue_ledger",
)


def in_order(name: str, rows: Any) -> pl.DataFrame:
    frame = pl.DataFrame(rows)
    return frame.select(sorted(frame.columns)).sort(DECLARED[name].primary_key)


def difference(name: str, one: Any, other: Any) -> str:
    """The first rows in which two tables differ, with their accounts: each account is one example."""
    a, b = in_order(name, one), in_order(name, other)
    if a.equals(b, null_equal=True):
        return ""
    columns = a.columns
    only = [x.join(y.select(columns), on=columns, how="anti", nulls_equal=True) for x, y in ((a, b), (b, a))]
    return f"{name}: {only[0].head(3).to_dicts()} against {only[1].head(3).to_dicts()}"


@pytest.mark.parametrize("seed", range(WORLDS // WORLDS_A_CALL))
def test_any_order_and_repetition_of_5000_worlds_give_the_same_tables(seed: int) -> None:
    received = deliveries_of(WORLDS_A_CALL, seed)
    tables = billing_tables(as_rows(received))
    again = billing_tables(as_rows(repeated(received, random.Random(seed))))
    assert tables.pop("rejected").num_rows == again.pop("rejected").num_rows == 0
    assert set(tables) == set(again) >= set(FULL_PATH_TABLES)
    assert [d for name in tables if (d := difference(name, tables[name], again[name]))] == []
    assert tables["billing.event_versions"].num_rows > len(received)  # refunds inside charges are versions too
    assert pl.DataFrame(tables["billing.subscription_history"])["account"].n_unique() > 0.95 * WORLDS_A_CALL


def test_which_of_two_times_an_event_has_does_not_depend_on_the_order() -> None:
    received = redated(deliveries_of(300, 7), random.Random(7))
    tables, again = billing_tables(as_rows(received)), billing_tables(as_rows(random.Random(8).sample(received, len(received))))
    rejected = pl.DataFrame(tables.pop("rejected"))
    assert rejected.sort("topic", "partition", "offset").equals(
        pl.DataFrame(again.pop("rejected")).sort("topic", "partition", "offset")
    )
    assert set(rejected["reason"]) == {"conflicting_copy"}
    assert rejected["detail"].str.contains("created_at").all()
    assert [d for name in tables if (d := difference(name, tables[name], again[name]))] == []


def test_as_known_at_t_is_the_same_function_of_what_was_received_by_then() -> None:
    rng = random.Random(1)
    received = repeated(deliveries_of(300, 99), rng)
    versions = pl.DataFrame(billing_tables(as_rows(received))["billing.event_versions"])
    for moment in rng.sample([d.received_at for d in received], 3):
        then = billing_tables(as_rows([d for d in received if d.received_at <= moment]))["billing.event_versions"]
        known = versions.filter(pl.col("recorded_at") <= moment)
        assert difference("billing.event_versions", known, then) == ""


def feed(lake: Lake, batch: list[Delivery]) -> None:
    """Append deliveries to raw, each at the next offset of its partition."""
    table = lake.open_for_write("raw.stripe_events")
    start = vector_of(table.metadata, "raw.stripe_events")
    at = {p: start.get(("stripe", p), 0) for p in range(3)}
    expected = {("stripe", p): at[p] for p in at}
    placed = []
    for d in batch:
        placed.append(Delivery(d.body, d.received_at, d.partition, at[d.partition]))
        at[d.partition] += 1
    append_rows(
        lake, "raw.stripe_events", as_rows(placed), expected, {("stripe", p): n for p, n in at.items()}, {"stripe": "test"}
    )


def contents(lake: Lake, name: str) -> Any:
    columns = ", ".join(f'"{c}"' for c in DECLARED[name].column_names if c not in ("topic", "partition", "offset"))
    return query(lake, f"SELECT {columns} FROM {name}")


@pytest.mark.parametrize("seed", range(FULL_PATH))
def test_any_split_into_batches_and_any_restart_give_what_the_pure_function_gives(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(touched, "SLICE_ROWS", rng.choice([30, touched.SLICE_ROWS]))
    monkeypatch.setattr(deletes, "SMALL", 0)  # files of a few rows would all be written again
    monkeypatch.setattr(deletes, "SPARSE", rng.choice([1, 2, deletes.SPARSE]))
    _same_as_pure(repeated(deliveries_of(20, 1000 + seed), rng), rng, tmp_path)


@pytest.mark.parametrize("seed", range(REDATED * FULL_PATH // 25))
def test_so_do_copies_of_an_event_that_say_another_time(seed: int, tmp_path: Path) -> None:
    """An event never changes at Stripe. If one id says two times all the same, the first receipt counts."""
    rng = random.Random(seed)
    _same_as_pure(redated(deliveries_of(20, 2000 + seed), rng), rng, tmp_path)


def _as_a_new_process(home: Path, run_id: str, **settings: Any) -> Lake:
    """The lake with nothing kept from before; DuckDB on one thread, as the suite has a worker on each core."""
    return open_lake(Settings(home=home, duckdb_threads=1, **settings), Run(run_id, "test"))


def _same_as_pure(received: list[Delivery], rng: random.Random, home: Path) -> None:
    """Deliver in batches, with a new process after each; then compare the tables with what the pure function makes."""
    cuts = sorted(rng.sample(range(1, len(received)), rng.randint(1, 2)))
    for a, b in zip([0, *cuts], [*cuts, len(received)], strict=True):
        feed(_as_a_new_process(home, f"feed-{a}"), received[a:b])
        # a process starts, advances some of the tables, and is gone; the next one goes on from the tables' own positions
        lake = _as_a_new_process(home, f"run-{a}", batch_rows=rng.choice([60, 10_000]))
        run(lake, FULL_PATH_TABLES[: rng.randint(1, len(FULL_PATH_TABLES))])
    lake = _as_a_new_process(home, "last")
    run(lake, FULL_PATH_TABLES)
    tables = billing_tables(as_rows(received))
    for name in FULL_PATH_TABLES:
        left = pl.DataFrame(tables[name])
        columns = [c for c in left.columns if c not in ("topic", "partition", "offset")]
        found = pl.DataFrame(contents(lake, name))
        assert difference(name, left.select(columns), found.select(columns)) == ""
