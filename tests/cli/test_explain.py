"""`lakehouse explain`: every figure of a played world from its row to the bytes that it rests on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Ran

from lakehouse.declarations import load_declarations
from lakehouse.explain import WITHHELD, _literal, explain
from lakehouse.lake import open_lake, snapshot_inputs
from lakehouse.queries import parameters_of, query
from lakehouse.settings import ROOT, load_settings

DECLARED = load_declarations(ROOT / "catalog")
EXPLAINED = {name: d for name, d in DECLARED.items() if d.explain}


def some_rows(table: str, count: int) -> list[str]:
    """Conditions that name rows of a table: those with the most in them, by its first measure."""
    lake, declared = open_lake(load_settings()), DECLARED[table]
    first = next((m for e in declared.explain for m in e.measures), declared.primary_key[0])
    keys = ", ".join(declared.primary_key)
    found = query(lake, f"SELECT {keys} FROM {table} ORDER BY {first} DESC NULLS LAST, {keys} LIMIT {count}").to_pylist()
    return [" AND ".join(f"{k} = {_literal(v)}" for k, v in row.items()) for row in found]


def records(steps: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for step in steps:
        for entry in step["entries"]:
            if entry["record"]:
                yield entry["record"]
            yield from records(entry["steps"])


def test_what_a_declaration_names_is_there() -> None:
    for declared in EXPLAINED.values():
        for explained in declared.explain:
            parts = [explained.where, *explained.also.values(), *explained.measures.values()]
            assert set(parameters_of("SELECT " + ", ".join(f"({p})" for p in parts))) <= set(declared.column_names)


def test_every_mart_is_explained() -> None:
    assert {n for n in DECLARED if n.startswith("marts.")} - set(EXPLAINED) == set()


@pytest.mark.parametrize("table", EXPLAINED)
def test_rows_add_up_to_their_figures_and_lead_to_raw_records(call: Callable[..., Ran], world: Path, table: str) -> None:
    lake = open_lake(load_settings())
    made_from = snapshot_inputs(lake.load(table).current_snapshot())  # type: ignore[arg-type]
    (where,) = some_rows(table, 1)
    found = call("explain", table, "--where", where, "--entries", "1", "--json").fine().json
    figures = [f for s in found["steps"] for f in s["figures"]]
    assert [f for f in figures if not f["agrees"]] == []
    assert {f["measure"] for f in figures} == {m for e in DECLARED[table].explain for m in e.measures}
    for step in found["steps"]:
        assert step["snapshot_id"] == made_from[step["source"]]
    reached = list(records(found["steps"]))
    assert reached
    for record in reached:
        assert record["payload"] == WITHHELD
        (stored,) = query(
            lake,
            f'SELECT payload, received_at FROM {record["table"]} WHERE topic = $t AND "partition" = $p AND "offset" = $o',
            parameters={"t": record["topic"], "p": record["partition"], "o": record["offset"]},
        ).to_pylist()
        assert hashlib.sha256(stored["payload"]).hexdigest() == record["payload_sha256"]
        assert len(stored["payload"]) == record["payload_bytes"]
        assert Path(record["file"].removeprefix("file://")).exists()
        assert record["snapshot_id"] in {s.snapshot_id for s in lake.load(record["table"]).snapshots()}


@pytest.mark.usefixtures("world")
def test_one_measure_lists_the_rows_that_count_for_it_and_no_others(call: Callable[..., Ran]) -> None:
    (where,) = some_rows("marts.mrr_movements", 1)
    found = call("explain", "marts.mrr_movements", "--where", where, "--measure", "new_minor", "--entries", "100", "--json")
    (step,) = found.fine().json["steps"]
    (figure,) = step["figures"]
    entries = [e["row"] for e in step["entries"]]
    assert len(entries) == step["rows"] < query(open_lake(load_settings()), "FROM billing.mrr_movements").num_rows
    assert {e["movement"] for e in entries} == {"new"}
    assert sum(e["change_minor"] for e in entries) == figure["row"] == figure["found"] > 0


@pytest.mark.usefixtures("world")
def test_what_is_restricted_is_withheld_until_it_is_asked_for(call: Callable[..., Ran]) -> None:
    (where,) = some_rows("marts.workspace_engagement_daily", 1)
    asked = ("explain", "marts.workspace_engagement_daily", "--where", where, "--measure", "events", "--entries", "1")
    masked = call(*asked).fine().out
    assert "SHA-256" in masked
    shown = call(*asked, "--show-restricted", "--json").fine().json
    (entry,) = shown["steps"][0]["entries"]
    address = entry["row"]["ip"]
    assert address not in masked
    assert address in entry["record"]["payload"]
    assert hashlib.sha256(entry["record"]["payload"].encode()).hexdigest() == entry["record"]["payload_sha256"]
    assert json.loads(entry["record"]["payload"])["event_id"] == entry["row"]["event_id"]
    assert address in call(*asked, "--show-restricted").fine().out


def test_a_figure_that_its_rows_do_not_make_is_told(call: Callable[..., Ran], world: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "catalog", tmp_path / "catalog")
    declaration = tmp_path / "catalog" / "marts" / "revenue_daily.yaml"
    declaration.write_text(declaration.read_text("utf-8").replace("entry_type = 'charge'", "entry_type = 'refund'", 1), "utf-8")
    (where,) = some_rows("marts.revenue_daily", 1)
    told = call(
        "explain",
        "marts.revenue_daily",
        "--where",
        where,
        "--measure",
        "booked_gross_minor",
        LAKEHOUSE_CATALOG_DIR=str(tmp_path / "catalog"),
    )
    assert told.code == 3
    assert "DIFFERS" in told.out
    assert "marts.revenue_daily.booked_gross_minor is " in told.err


@pytest.mark.usefixtures("world")
def test_a_day_that_is_not_complete_says_so_with_the_watermark(call: Callable[..., Ran]) -> None:
    lake = open_lake(load_settings())
    (last,) = query(
        lake, "SELECT activity_date AS d, workspace_id AS w FROM marts.workspace_engagement_daily WHERE NOT complete LIMIT 1"
    ).to_pylist()
    asked = ("explain", "marts.workspace_engagement_daily", "--measure", "events", "--where")
    told = call(*asked, f"activity_date = '{last['d']}' AND workspace_id = '{last['w']}'").fine().out
    assert "not complete yet" in told
    assert "complete until 2026-" in told
    assert "raw.product_events to 2026-" in told
    call(*asked, "activity_date = '2031-01-01'").failed(
        2,
        "has no row with activity_date = '2031-01-01'; marts.workspace_engagement_daily is complete until 2026-",
        "Its key: workspace_id, activity_date",
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["marts.revenue_daly", "--where", "true"], "did you mean marts.revenue_daily?"),
        (["billing.charges", "--where", "true"], "does not declare what its rows are made of"),
        (["marts.upgrade_funnel", "--where", "true"], "name one by its key (plan, feature): plan = '"),
        (["marts.upgrade_funnel", "--where", "plan ="], "is no condition"),
        (["marts.upgrade_funnel", "--where", "true) UNION (SELECT 1"], "columns of marts.upgrade_funnel alone"),
        (
            ["marts.upgrade_funnel", "--where", "plan IN (SELECT plan FROM product.events)"],
            "columns of marts.upgrade_funnel alone",
        ),
        (["marts.upgrade_funnel", "--where", "plam = 'pro'"], "plam"),
        (["marts.upgrade_funnel", "--where", "true", "--measure", "rate"], "does not explain 'rate'; what it explains: exposed_"),
    ],
    ids=lambda a: a[2][:30] if isinstance(a, list) else None,
)
@pytest.mark.usefixtures("world")
def test_wrong_questions_are_told_what_can_be_asked(call: Callable[..., Ran], arguments: list[str], said: str) -> None:
    call("explain", *arguments).failed(2, said)


def test_an_empty_lake_says_how_to_fill_it(call: Callable[..., Ran]) -> None:
    call("explain", "marts.revenue_daily", "--where", "true").failed(2, "holds nothing yet; fill it")


@pytest.mark.usefixtures("world")
def test_each_figure_in_the_library_is_what_the_command_says() -> None:
    (where,) = some_rows("marts.delinquent_feature_usage", 1)
    found = explain(open_lake(load_settings()), "marts.delinquent_feature_usage", where)
    assert found.differences == []
    (priced,) = [s for s in found.steps if "leakage_minor" in {f.measure for f in s.figures}]
    (entry,) = priced.entries
    day, whole, reached, uses = (
        int(v) for v in (entry.row["day_minor"], entry.row["whole"], entry.row["reached"], found.row["events"])
    )
    assert found.row["leakage_minor"] == day * reached // whole - day * (reached - uses) // whole
