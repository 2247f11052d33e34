"""Help and usage errors: what a reader of `--help` or of a typing error is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from command import SMALL, Ran, finish, start

from lakehouse.cli import (  # noqa: F401 - they register their commands
    audit,
    bench,
    explain,
    explore,
    ingest,
    maintain,
    operate,
    positions,
    reconcile,
    rendering,
    replay,
    report,
    revenue,
    shell,
)
from lakehouse.cli.app import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

JSON_EXAMPLES = {
    "sql": ["SELECT 1 AS one"],
    "show": ["product.events"],
    "where": ["product.events"],
    "status": [],
    "settings": [],
    "demo": [*SMALL],
    "run": ["product.events"],
    "verify": [],
    "scan": ["ops.dead_letters"],
    "bench": [],
    "audit": ["attribution", "--sample", "100"],
    "replay": ["product.events", "--dry-run"],
    "maintain": ["ops.dead_letters", "--dry-run"],
    "revenue": [],
    "report": [],
    "explain": ["marts.mrr_movements", "--where", "currency = 'usd' AND month = '2026-01-01' AND plan = 'pro'"],
    "render": ["soda", "product.events"],
}
# with services in test_services.py and test_reconcile_commands.py; what changes the world, in test_operate.py
ELSEWHERE = {"compare-vendor", "ingest", "reconcile", "rollback", "tag", "untag"}


def words(text: str) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─`]", " ", text).split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_and_what_each_parameter_means(call: Callable[..., Ran], name: str) -> None:
    told = words(call(name, "--help", COLUMNS="200").fine().out)
    summary = words(COMMANDS[name].help.split("\n\n")[0])
    assert len(summary) > 20
    assert summary in told
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"{name}: {parameter.name} has no help"


def test_the_command_alone_prints_help_that_lists_all(call: Callable[..., Ran]) -> None:
    alone = call(COLUMNS="200")
    told = words(alone.out + alone.err)
    assert [name for name in COMMANDS if f" {name} " not in told] == []
    assert "lakehouse demo" in told
    assert call("--help").fine().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["statu"], "Did you mean 'status'?"),
        (["nothing-like-it"], "No such command 'nothing-like-it'"),
        (["demo", "--custmers", "3"], "--customers"),
        (["demo", "--customers", "3"], "--customers"),
        (["demo", "--customers", "many"], "--customers"),
        (["sql"], "QUERY"),
        (["show"], "TABLE"),
        (["render", "oracle"], "'snowflake', 'soda', 'dictionary'"),
        (["rollback", "product.events", "newest"], "SNAPSHOT"),
    ],
)
def test_wrong_usage_is_told_with_the_way_out(call: Callable[..., Ran], arguments: list[str], said: str) -> None:
    call(*arguments, COLUMNS="200").failed(2, "Usage: ", said, " -h")


def test_an_unknown_benchmark_is_told_the_closest(call: Callable[..., Ran]) -> None:
    call("bench", "rod").failed(2, "no benchmark 'rod'; did you mean road?")


def test_wrong_usage_of_the_real_command(tmp_path: Path) -> None:
    """As a process: Typer brings a Click of its own, whose errors are not those of the package `click`."""
    finish(start(tmp_path / "home", "statu")).failed(2, "Did you mean 'status'?")


def test_json_of_every_command_is_all_that_stdout_gets(call: Callable[..., Ran], world: Path) -> None:
    able = {name for name, command in COMMANDS.items() if any("--json" in p.opts for p in command.params)}
    assert able == JSON_EXAMPLES.keys() | ELSEWHERE
    for name, arguments in JSON_EXAMPLES.items():
        assert call(name, *arguments, "--json").fine().json
