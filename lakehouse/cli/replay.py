"""The command `replay`: dead letters are processed again after a fix."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import msgspec
import typer

from lakehouse.cli.app import AsJson, app, counted, lake, out, print_json, print_rows
from lakehouse.cli.operate import telling
from lakehouse.dead_letters import open_letters
from lakehouse.replay import replay as replay_letters

DAY_OR_TIME = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"]


def utc(moment: datetime | None) -> datetime | None:
    """A day or time of the command line, which is in UTC."""
    return moment.replace(tzinfo=UTC) if moment else None


@app.command()
def replay(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="The table whose transform refused the records.")],
    reason: Annotated[str | None, typer.Option(help="Only letters with this reason, e.g. unknown_status.")] = None,
    since: Annotated[
        datetime | None, typer.Option("--from", formats=DAY_OR_TIME, help="Only records received from then on (UTC).")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option("--to", formats=DAY_OR_TIME, help="Only records received before (UTC).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count the letters, by reason.")] = False,
    as_json: AsJson = False,
) -> None:
    """Process dead letters again, after their transform was fixed: what it can use now lands, the rest stays a letter.

    Records are read from raw by their coordinates, and the tables below are brought up to date with them. Nothing is lost, and
    again is harmless. See what waits: [bold]lakehouse replay TABLE --dry-run[/]
    """
    opened = lake()
    opened.declaration(table)
    if dry_run:
        letters = open_letters(opened, table, reason, utc(since), utc(until))
        counts = sorted(letters.group_by("reason").len().iter_rows())
        if as_json:
            print_json({"table": table, "open": dict(counts)})
        elif counts:
            print_rows(["reason", "open letters"], counts)
        else:
            out.print(f"No open dead letters of {table} match.")
        return
    with telling() as say:
        done = replay_letters(opened, table, reason, utc(since), utc(until), say)
    if as_json:
        print_json(msgspec.to_builtins(done))
        return
    if not done.letters:
        out.print(f"No open dead letters of {table} match.")
        return
    out.print(
        f"{counted(done.letters, 'letter')} replayed: {done.resolved:,} resolved, {sum(done.refused.values()):,} still refused."
    )
    if done.refused:
        print_rows(["still refused because", "letters"], list(done.refused.items()))
    if done.gone:
        out.print(f"{counted(done.gone, 'letter')} cannot be replayed: raw no longer holds the record.")
    if done.tables:
        out.print(f"Brought up to date: {', '.join(done.tables)}")
