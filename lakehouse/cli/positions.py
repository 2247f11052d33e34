"""The commands `positions show` and `positions set`: where a raw table stands in its topic, and how a person moves it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lakehouse import parts
from lakehouse.cli.app import AsJson, app, lake, out, print_json, print_rows
from lakehouse.errors import UsageError
from lakehouse.services import find_services

positions = typer.Typer(no_args_is_help=True, help="See and set how far raw tables have read their Kafka topics.")
app.add_typer(positions, name="positions")

OneTable = Annotated[str, typer.Argument(metavar="TABLE", help="A raw table that a topic is written to.")]
COLUMNS = ["topic", "partition", "next_offset", "first", "end", "lag", "state"]


@positions.command()
def show(table: OneTable, as_json: AsJson = False) -> None:
    """Each partition: the table's next offset, the first offset and the end of Kafka's log, and what is still to be read."""
    opened = lake()
    opened.declaration(table)  # a misspelt name is told before Kafka is looked for
    found = [asdict(s) for s in parts.writers().standings(opened, find_services(opened.settings), table)]
    if as_json:
        print_json(found)
        return
    print_rows(COLUMNS, [[s[c] for c in COLUMNS] for s in found])


@positions.command("set")
def set_(
    table: OneTable,
    partition: Annotated[str, typer.Argument(metavar="PARTITION", help="A partition's number, or `all`.")],
    offset: Annotated[
        str,
        typer.Argument(
            metavar="OFFSET", help="Next offset to read, or `earliest`, `latest`, or `keep` (take over a moved topic)."
        ),
    ],
    why: Annotated[str, typer.Option(help="The reason; it stands in the table's history, with your name.")],
    again: Annotated[bool, typer.Option("--again", help="Go back below what is stored: those rows will be there twice.")] = False,
    skip: Annotated[
        bool, typer.Option("--skip", help="Leave out records that Kafka still has: they will never be read.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Let the writers of a table go on at another offset: one commit, like any other, with the reason in its summary.

    For when Kafka no longer has what the table stands at, or a topic was moved to another cluster with its offsets. Running
    writers drop what they have in hand and go on from there. What would double or lose records is refused unless you say so.
    """
    if partition != "all" and not partition.isdecimal():
        raise UsageError(f"{partition!r} is no partition: give its number, or `all`")
    if offset not in ("earliest", "latest", "keep") and not offset.isdecimal():
        raise UsageError(f"{offset!r} is no offset: give a number, `earliest`, `latest` or `keep`")
    if not why.strip():
        raise UsageError("say why: it stands in the table's history")
    opened = lake()
    opened.declaration(table)
    chosen = [] if partition == "all" else [int(partition)]
    to = int(offset) if offset.isdecimal() else offset
    services = find_services(opened.settings)
    found = parts.writers().set_positions(opened, services, table, chosen, to, why, again=again, skip=skip)
    if as_json:
        print_json([asdict(s) for s in found])
        return
    print_rows(COLUMNS, [[asdict(s)[c] for c in COLUMNS] for s in found])
    out.print(f"\nWritten into the history of {table}: lakehouse show {table}")
