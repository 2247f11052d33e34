"""The command `explain`: from one figure to the rows it is made of, to the raw records, to their bytes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from lakehouse.cli.app import AsJson, app, cell, counted, lake, out, plain, print_json, print_records, print_rows, size
from lakehouse.cli.explore import TableName
from lakehouse.cli.operate import telling
from lakehouse.completeness import said
from lakehouse.errors import ChecksFailed
from lakehouse.explain import Entry, Explanation, Record, Step
from lakehouse.explain import explain as explain_row


@app.command()
def explain(
    table: TableName,
    where: Annotated[str, typer.Option("--where", help="A condition that one row fulfils, best on its key.")],
    measure: Annotated[str | None, typer.Option("--measure", help="Only this column (default: all that are explained).")] = None,
    entries: Annotated[int, typer.Option("--entries", min=1, max=100, help="Rows to follow at each step, down to raw.")] = 2,
    show_restricted: Annotated[
        bool, typer.Option("--show-restricted", help="Show personal and restricted columns, and payloads.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Explain a figure: the rows that it is made of, what they add up to, their raw records with offset, file and snapshot.

    The rows are those of the snapshots that the table was made from. Exit 3 if they do not add up to the figure. Personal and
    restricted columns are withheld; of a payload its size and SHA-256 are told.

    Example:

      lakehouse explain marts.revenue_daily --where "currency = 'usd' AND revenue_date = '2026-02-10'" --measure booked_net_minor
    """
    opened = lake()
    with telling() as say:
        say(f"looking for what {table} is made of")
        found = explain_row(opened, table, where, measure, entries, withheld=not show_restricted)
    if as_json:
        print_json(asdict(found))
    else:
        _tell(found)
    if found.differences:
        raise ChecksFailed("it does not add up: " + "; ".join(found.differences))


def _tell(found: Explanation) -> None:
    out.print(f"[bold]{found.table}[/], snapshot {found.snapshot_id}")
    print_records(list(found.row), [list(found.row.values())])
    if found.complete is False:
        out.print(f"[yellow]not complete yet[/]: {said(found.standing)}", soft_wrap=True)
    for step in found.steps:
        _tell_step(step, 1)


def _tell_step(step: Step, depth: int) -> None:
    out.print(
        f"\n{'  ' * (depth - 1)}[bold]{'←' * depth} {step.source}[/]: {counted(step.rows, 'row')}, {escape(step.why)} "
        f"[dim](snapshot {step.snapshot_id})[/]",
        soft_wrap=True,
    )
    if step.note:
        out.print(f"[yellow]{step.note}[/]", soft_wrap=True)
    if step.figures:
        print_rows(
            ["measure", "says", "rows make", ""],
            [[f.measure, f.row, f.found, "adds up" if f.agrees else "DIFFERS"] for f in step.figures],
        )
    for number, entry in enumerate(step.entries, 1):
        _tell_entry(entry, f"row {number} of {step.rows:,}", depth)


def _tell_entry(entry: Entry, title: str, depth: int) -> None:
    print_rows(["", ""], [(k, v) for k, v in entry.row.items() if v is not None], title=title)
    if entry.record:
        _tell_record(entry.record)
    for step in entry.steps:
        _tell_step(step, depth + 1)


def _tell_record(record: Record) -> None:
    facts = {
        "raw record": f"{record.table}: {record.topic}, partition {record.partition}, offset {record.offset}",
        "received at": record.received_at,
        "file": record.file,
        "snapshot": f"{record.snapshot_id}, committed {record.committed_at:%Y-%m-%d %H:%M:%S}Z" if record.committed_at else None,
        **{k: v for k, v in record.columns.items() if k != "headers"},
        "payload": f"{size(record.payload_bytes)}, SHA-256 {record.payload_sha256}" if record.payload_bytes is not None else None,
        "": plain(record.payload),
        "note": record.note or None,
    }
    for name, value in facts.items():
        if value is not None:
            out.print(f"[dim]{name:<15}[/]  {cell(value)}", soft_wrap=True)
