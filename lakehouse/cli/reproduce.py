"""The commands `hash` and `reproduce`: what a table holds as one number, and the same rows made again from its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from lakehouse.cli.app import AsJson, app, lake, out, print_json, print_rows
from lakehouse.cli.operate import telling
from lakehouse.errors import ChecksFailed, UsageError
from lakehouse.reproduce import Record, record_of
from lakehouse.reproduce import reproduce as make_again

Table = Annotated[str, typer.Argument(metavar="TABLE", help="Name of a table, e.g. product.events.")]
SnapshotId = Annotated[
    int | None, typer.Option("--snapshot", help="A snapshot of: lakehouse show TABLE (default: the current one).")
]


@app.command("hash")
def hash_(table: Table, snapshot: SnapshotId = None, as_json: AsJson = False) -> None:
    """Hash the rows of a table, whatever their order and files; with what it was made from.

    Two tables with one hash hold the same rows. As JSON it is a record from which `lakehouse reproduce --record FILE` makes the
    same rows again, also when the table is gone.
    """
    record = record_of(lake(), table, snapshot)
    if as_json:
        print_json(msgspec.to_builtins(record))
        return
    out.print(f"{record.hash}  {record.table}, {record.rows:,} rows, snapshot {record.snapshot_id}", soft_wrap=True)


@app.command()
def reproduce(
    table: Table,
    snapshot: SnapshotId = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Reproduce what this file says (of `lakehouse hash TABLE --json`), not what the table says."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a snapshot of a table again, from the snapshots of its inputs that it records, and compare the rows.

    The table itself is not read for it. Exit 3 if the rows differ. Inputs that must stay are pinned: lakehouse tag TABLE NAME.
    """
    opened = lake()
    opened.declaration(table)
    known = _read(record, table) if record else record_of(opened, table, snapshot)
    with telling() as say:
        done = make_again(opened, known, say)
    if as_json:
        print_json({**msgspec.to_builtins(done), "same": done.same})
    else:
        rows = [["recorded", known.rows, known.hash, known.code_version], ["made again", done.rows, done.hash, done.code_version]]
        print_rows(["", "rows", "hash", "code"], rows)
        out.print(f"from {', '.join(f'{name} at {s}' for name, s in known.inputs.items())}", soft_wrap=True)
    if not done.same:
        other = "" if known.code_version == done.code_version else "; it was made by other code"
        raise ChecksFailed(f"{table}: snapshot {known.snapshot_id} is not what its inputs give{other}")
    if not as_json:
        out.print(f"The same rows, in {done.seconds:.1f} s.")


def _read(path: Path, table: str) -> Record:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"--record {path}: {error}; make one: lakehouse hash {table} --json > {path}") from None
    if found.table != table:
        raise UsageError(f"--record {path} is of {found.table}, not of {table}")
    return found
