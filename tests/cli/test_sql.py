"""`lakehouse sql`: questions, time travel, what people get wrong, and that nobody can change the lake by it."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from command import Ran, finish, start

COUNT = "SELECT count(*) AS n FROM product.events"


@pytest.fixture(autouse=True)
def _in_the_world(world: Path) -> None:
    """Every test here asks the small world."""


@pytest.fixture
def events(call: Callable[..., Ran]) -> list[dict[str, Any]]:
    """The snapshots of product.events, newest first."""
    found: list[dict[str, Any]] = call("show", "product.events", "--json").fine().json["snapshots"]
    assert len(found) >= 2
    return found


def test_rows_for_people(call: Callable[..., Ran]) -> None:
    out = call("sql", "SELECT plan, count(*) AS n FROM product.events GROUP BY plan ORDER BY n DESC LIMIT 2").fine().out
    header, rule, *rows = out.splitlines()
    assert header.split() == ["plan", "n"]
    assert set(rule) == {"─"}
    assert len(rows) == 2
    assert rows[0].split()[1].replace(",", "").isdigit()


def test_the_real_command_prints_json_alone(world: Path) -> None:
    assert finish(start(world, "sql", COUNT, "--json")).fine().json == [{"n": 5000}]


def test_a_join_of_several_tables_and_a_query_of_none(call: Callable[..., Ran]) -> None:
    joined = call(
        "sql",
        "--json",
        "SELECT count(*) = 5000 AS every_event, count(c.customer_id) > 0 AS some_paid, "
        "count(DISTINCT s.subscription_id) > 5 AS many FROM product.events e LEFT JOIN billing.customers c USING (customer_id) "
        "LEFT JOIN billing.subscriptions s ON s.subscription_id = e.subscription_id",
    )
    assert joined.fine().json == [{"every_event": True, "some_paid": True, "many": True}]
    assert call("sql", "select 1 AS one").fine().out.split() == ["one", "───", "1"]


def test_as_of_a_snapshot(call: Callable[..., Ran], events: list[dict[str, Any]]) -> None:
    for snapshot in events:
        ran = call("sql", "--json", COUNT, "--as-of", str(snapshot["snapshot_id"]))
        assert ran.fine().json == [{"n": snapshot["total_rows"]}]
    assert events[0]["total_rows"] != events[-1]["total_rows"]


def test_as_of_a_snapshot_of_one_table_is_a_moment_for_the_others(call: Callable[..., Ran], events: list[dict[str, Any]]) -> None:
    raw = "SELECT (SELECT count(*) FROM product.events) AS events, (SELECT count(*) FROM raw.product_events) AS raw"
    first = call("sql", "--json", raw, "--as-of", str(events[-1]["snapshot_id"])).fine().json[0]
    now = call("sql", "--json", raw).fine().json[0]
    assert first["events"] == events[-1]["total_rows"]
    assert 0 < first["raw"] < now["raw"]


@pytest.mark.parametrize("zone", ["+00:00", "Z", "", "+05:30"])
def test_as_of_a_time_between_two_snapshots(call: Callable[..., Ran], events: list[dict[str, Any]], zone: str) -> None:
    """Without a zone it is UTC."""
    after = datetime.fromisoformat(events[-1]["committed_at"]) + timedelta(milliseconds=1)
    assert after < datetime.fromisoformat(events[-2]["committed_at"])
    if zone == "+05:30":
        after += timedelta(hours=5, minutes=30)
    moment = after.replace(tzinfo=None).isoformat() + zone
    assert call("sql", "--json", COUNT, "--as-of", moment, TZ="Asia/Tokyo").fine().json == [{"n": events[-1]["total_rows"]}]


def test_as_of_before_the_table_existed_is_empty(call: Callable[..., Ran]) -> None:
    assert call("sql", "--json", COUNT, "--as-of", "2020-01-01").fine().json == [{"n": 0}]
    assert call("sql", "SELECT plan FROM product.events", "--as-of", "2020-01-01").fine().out.endswith("no rows\n")


@pytest.mark.parametrize(
    ("as_of", "said"),
    [
        ("yesterday", "neither a snapshot id nor a time like 2026-"),
        ("2026-13-45", "neither a snapshot id nor a time"),
        ("²²²²²²²²²²", "neither a snapshot id nor a time"),
        ("1234567890123456789", "none of the tables read (product.events) has a snapshot 1234567890123456789"),
    ],
)
def test_a_bad_as_of(call: Callable[..., Ran], as_of: str, said: str) -> None:
    call("sql", COUNT, "--as-of", as_of).failed(2, said)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT * FORM product.events", ["syntax error", "LINE 1", "^"]),
        ("SELCT 1", ["syntax error", "SELCT"]),
        ("SELECT 'open FROM product.events", ["unterminated"]),
        ("", ["no query"]),
        ("/* nothing */", ["no query"]),
        ("SELECT 1; SELECT 2", ["one query at a time", "2 statements"]),
        ("SELECT * FROM product.event", ["no table 'product.event'", "did you mean product.events?"]),
        ("SELECT * FROM events", ["events", "The tables: ", "product.events"]),
        ("SELECT evnt_id FROM product.events", ["evnt_id", "event_id", "LINE 1"]),
        ("SELECT CAST('x' AS INT)", ["SQL error", "'x'"]),
        ("SELECT 'infinity'::TIMESTAMP", ["cannot be shown", "CAST(... AS VARCHAR)"]),
    ],
)
def test_what_is_wrong_with_a_query_is_said(call: Callable[..., Ran], query: str, said: list[str]) -> None:
    call("sql", query).failed(2, *said)
    call("sql", query, "--json").failed(2, *said)


@pytest.mark.parametrize(
    "statement",
    [
        "DROP VIEW product.events",
        "DROP TABLE product.events",
        "DELETE FROM product.events",
        "INSERT INTO product.events SELECT * FROM product.events",
        "UPDATE product.events SET plan = 'pro'",
        "CREATE TABLE mine AS SELECT 1",
        "COPY (SELECT 1) TO '{file}'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{file}'",
        "EXPORT DATABASE '{file}'",
        "ATTACH '{file}' AS mine",
        "INSTALL spatial",
        "LOAD icu",
        "SET threads = 1",
        "SELECT 1; COPY (SELECT 1) TO '{file}'",
    ],
)
def test_it_only_reads(call: Callable[..., Ran], tmp_path: Path, statement: str) -> None:
    """These would change a private copy at best, and COPY writes files: refused, so that nobody believes to have done it."""
    file = tmp_path / "written"
    ran = call("sql", statement.format(file=file)).failed(2)
    assert "only reads" in ran.err or "one query at a time" in ran.err
    assert not file.exists()
    assert call("sql", "--json", COUNT).json == [{"n": 5000}]


def test_values_are_printed_as_they_are(call: Callable[..., Ran]) -> None:
    """Neither markup in data nor in a column's name is obeyed, nothing is cut, NULL is told from text."""
    wide = "x" * 700
    ran = call("sql", f"SELECT '[red]x[/red]' AS \"[bold]b\", '[/]' AS c, NULL AS d, '{wide}' AS e, 1e-9 AS f", COLUMNS="80")
    out = ran.fine().out
    assert "[red]x[/red]" in out
    assert "[bold]b" in out
    assert "[/]" in out
    assert "NULL" in out
    assert out.count("x") == 700 + 1
    assert "1e-09" in out


def test_a_row_too_wide_for_the_screen_is_printed_as_a_list(call: Callable[..., Ran]) -> None:
    narrow = call("sql", "SELECT * FROM product.events LIMIT 2", COLUMNS="80").fine().out
    assert max(len(line) for line in narrow.splitlines()) <= 80
    assert narrow.count("subscription_id ") == 2
    assert "row 2" in narrow
    empty = call("sql", "SELECT * FROM product.events LIMIT 0", COLUMNS="80").fine().out
    assert "lateness_seconds" in empty
    assert empty.endswith("no rows\n")


def test_more_rows_than_are_shown_is_said(call: Callable[..., Ran]) -> None:
    out = call("sql", "SELECT i FROM range(100) t(i)", "--rows", "3").fine().out
    assert out.splitlines()[-1] == "3 of 100 rows; more with --rows N"
    assert len(call("sql", "SELECT i FROM range(100) t(i)", "--rows", "3", "--json").json) == 100


def test_every_kind_of_value_has_a_json_form(call: Callable[..., Ran]) -> None:
    query = """SELECT TIME '10:00' AS t, DATE '2026-01-02' AS d, TIMESTAMPTZ '2026-01-02 03:04:05Z' AS at, 'NaN'::DOUBLE AS nan,
        1.50::DECIMAL(9, 2) AS amount, INTERVAL '1 month 2 days 3 seconds' AS span, -INTERVAL '90 minutes' AS back,
        {'a': 1} AS struct, [1, NULL] AS list, '\\xFF'::BLOB AS bytes, 'ok'::BLOB AS text,
        1 AS twice, 2 AS twice, NULL AS nothing, '00000000-0000-0000-0000-000000000001'::UUID AS id"""
    assert call("sql", query, "--json").fine().json == [
        {
            "t": "10:00:00",
            "d": "2026-01-02",
            "at": "2026-01-02T03:04:05+00:00",
            "nan": "nan",
            "amount": "1.50",
            "span": "1 month 2 days 00:00:03",
            "back": "-01:30:00",
            "struct": {"a": 1},
            "list": [1, None],
            "bytes": "ff",
            "text": "ok",
            "twice": 1,
            "twice_1": 2,
            "nothing": None,
            "id": "00000000-0000-0000-0000-000000000001",
        }
    ]
    call("sql", query).fine()


def test_a_pipe_that_closes_early_is_no_failure_worth_a_word(world: Path) -> None:
    process = start(world, "sql", "SELECT repeat('x', 1000) AS x FROM range(2000)", "--rows", "2000")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(30)


def test_a_mart_says_until_when_it_is_complete_beside_the_answer(call: Callable[..., Ran]) -> None:
    told = call("sql", "SELECT count(*) AS n FROM marts.revenue_daily WHERE revenue_date >= '2031-01-01'", "--json").fine()
    assert told.json == [{"n": 0}]
    assert re.search(r"marts.revenue_daily is complete until 2026-\d\d-\d\d, later days can still change", told.err)
    assert re.search(r"raw.stripe_events to 2026-\d\d-\d\d \d\d:\d\dZ", told.err)
    # one that is made of tables by day is as complete as those
    assert "marts.upgrade_funnel is complete until" in call("sql", "SELECT count(*) FROM marts.upgrade_funnel").fine().err
    for asked_itself in (
        "SELECT count(*) FROM marts.revenue_daily WHERE complete",
        "SELECT count(*) FROM product.events",
        "SELECT 1",
    ):
        assert call("sql", asked_itself).fine().err == ""
