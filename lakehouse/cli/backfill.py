"""The command `backfill`: the rows of a window made again from their inputs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import msgspec
import typer

from lakehouse.backfill import Slice
from lakehouse.backfill import backfill as make_again
from lakehouse.cli.app import AsJson, app, lake, out, print_json, print_rows
from lakehouse.cli.operate import telling


@app.command()
def backfill(
    start: Annotated[datetime, typer.Option("--from", formats=["%Y-%m-%d"], help="First day (UTC).")],
    end: Annotated[datetime, typer.Option("--to", formats=["%Y-%m-%d"], help="The day after the last one (UTC).")],
    tables: Annotated[list[str] | None, typer.Option("--tables", help="Only this table (may be repeated; default: all).")] = None,
    slice_days: Annotated[int, typer.Option(min=1, help="Days made at a time.")] = 1,
    parallel: Annotated[int, typer.Option(min=1, help="Slices made at the same time, each in its own process.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Make the rows of a window again from raw and from today's billing and CRM, whatever the tables hold there now.

    For after a fix of a transform, a column newly declared, or a doubt. Only what differs is written; again writes nothing, and a
    run that was stopped is gone on with. Events are chosen by when they happened, billing and CRM records by when they came.
    """
    since, until = start.replace(tzinfo=UTC), end.replace(tzinfo=UTC)
    with telling() as say:
        made = list(make_again(lake(), since, until, tables or (), slice_days=slice_days, parallel=parallel, say=say))
    if as_json:
        print_json([msgspec.to_builtins(s) for s in made])
        return
    if told := [_row(s) for s in made if s.changed]:
        print_rows(["table", "from", "to", "rows", "of which changed"], told)
    derived = [s for s in made if s.hash is not None]
    same = sum(not s.changed for s in derived)
    out.print(f"{len(derived)} slices of events made again, {same} of them the same as before.")


def _row(made: Slice) -> list[object]:
    return [made.table, f"{made.start:%Y-%m-%d}", f"{made.end:%Y-%m-%d}", made.rows, made.changed]
