"""`lakehouse shell`: through a pipe, at a terminal of its own, and how its lines become statements."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import COMMAND, Ran

from lakehouse.cli.shell import statements


@pytest.fixture
def piped(call: Callable[..., Ran], world: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """The shell over the small world, given lines through a pipe."""

    def run(text: str, *arguments: str) -> Ran:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return call("shell", *arguments)

    return run


@pytest.mark.parametrize(
    ("lines", "whole"),
    [
        (["select 1;"], ["select 1;"]),
        (["select 1", "  + 1;", "select 2"], ["select 1\n  + 1;", "select 2"]),
        (["select ';' AS a; select 2; -- that is all"], ["select ';' AS a;", "select 2;"]),
        (["select '", ";", "';"], ["select '\n;\n';"]),
        ([".tables", "", "-- nothing", ";", "select", ".5;"], [".tables", "select\n.5;"]),
    ],
)
def test_lines_become_statements(lines: list[str], whole: list[str]) -> None:
    assert list(statements(iter(lines))) == whole


def test_questions_through_a_pipe(piped: Callable[..., Ran]) -> None:
    ran = piped(".mode json\nSELECT count(*) AS n\nFROM product.events;\nSELECT 1 AS one").fine()
    found, end = json.JSONDecoder().raw_decode(ran.out)
    assert found == [{"n": 5000}]
    assert json.loads(ran.out[end:]) == [{"one": 1}]


def test_until_when_a_mart_is_complete_is_said_once(piped: Callable[..., Ran]) -> None:
    asked = "SELECT count(*) FROM marts.revenue_daily;"
    told = piped(f"{asked}\n{asked}\n.asof 2020-01-01\n{asked}").fine()
    assert told.err.count("marts.revenue_daily is complete until 2026-") == 1


def test_what_the_commands_show(piped: Callable[..., Ran]) -> None:
    out = (
        piped(".help\n.tables\n.schema billing.refunds\n.rows 1\nSELECT unnest([1, 2]) AS n;\n.quit\nSELECT 'never' AS asked;")
        .fine()
        .out
    )
    assert ".snapshots TABLE" in out
    assert "marts.upgrade_funnel" in out
    assert "refund_id" in out
    assert "1 of 2 rows" in out
    assert "never" not in out


def test_time_travel(piped: Callable[..., Ran], call: Callable[..., Ran]) -> None:
    snapshots = call("show", "product.events", "--json").json["snapshots"]
    first = snapshots[-1]
    count = "SELECT count(*) AS n FROM product.events;"
    out = piped(f".snapshots product.events\n.asof {first['snapshot_id']}\n{count}\n.asof now\n{count}").fine().out
    assert str(first["snapshot_id"]) in out
    assert [f"{first['total_rows']:,}", "5,000"] == [
        line.strip() for line in out.splitlines() if line.strip().replace(",", "").isdigit()
    ]
    assert f"{first['total_rows']:,}" in piped(count, "--as-of", str(first["snapshot_id"])).fine().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SELECT * FROM product.event;", "did you mean product.events?"),
        ("DROP TABLE product.events;", "only reads"),
        (".nothing", "no command '.nothing'; see .help"),
        (".schema", "it takes TABLE"),
        (".mode loud", "modes: table, json"),
        (".rows none", "no number of rows"),
        (".asof yesterday", "neither a snapshot id nor a time"),
    ],
)
def test_the_first_error_ends_a_pipe(piped: Callable[..., Ran], text: str, said: str) -> None:
    piped(f"{text}\nSELECT 1 AS never;").failed(2, said)


def test_at_a_terminal(world: Path) -> None:
    """As a user types it: an error is told and the prompt stays, Ctrl-C stops a query, Tab completes, lines are kept."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"LAKEHOUSE_HOME": str(world), "COLUMNS": "120", "TERM": "dumb"}
    process = subprocess.Popen(
        [COMMAND, "shell"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    said = ""

    def wait_for(text: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        nonlocal said
        deadline = time.monotonic() + 120
        while text not in said:
            assert time.monotonic() < deadline, said
            if select.select([ours], [], [], 2.0)[0]:
                said += os.read(ours, 4096).decode("utf-8", "replace")
            else:
                meanwhile()
        said = said.split(text, 1)[1]

    def type_in(text: str) -> None:
        os.write(ours, text.encode())

    try:
        wait_for("lake> ")
        type_in("SELECT nothing;\n")
        wait_for("error:")
        wait_for("lake> ")
        type_in("SELECT count(*) + 37 AS n FROM range(5) a, product.eve\t LIMIT 1;\n")
        wait_for("25,037")
        wait_for("lake> ")
        type_in("SELECT sum(a.range * b.range % 7) FROM range(10000000) a, range(10000000) b;\n")
        wait_for("stopped", lambda: process.send_signal(signal.SIGINT))
        wait_for("lake> ")
        type_in(".asof 2026-01-01\n")
        wait_for("lake as of 2026-01-01> ")
        type_in("\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)
    kept = world / "shell_history"
    assert "SELECT nothing;" in kept.read_text()
    assert kept.stat().st_mode & 0o777 == 0o600
