"""Commands for table health: maintain, tag, untag."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer

from lakehouse.cli.app import AsJson, app, lake, out, print_json, print_rows, size
from lakehouse.cli.operate import Tables, telling
from lakehouse.errors import Retryable
from lakehouse.maintenance.run import StepReport
from lakehouse.maintenance.run import maintain as maintain_tables
from lakehouse.maintenance.tags import remove_tag, tag_snapshot


class Step(StrEnum):
    """The steps, in the order in which they are done: see STEPS."""

    RETENTION = "retention"
    COMPACT = "compact"
    MANIFESTS = "manifests"
    EXPIRE = "expire"
    ORPHANS = "orphans"


Name = Annotated[str, typer.Argument(metavar="TABLE", help="Name of a table, e.g. product.events.")]
Tag = Annotated[str, typer.Argument(metavar="NAME", help="The tag: letters, digits, dots, dashes, underscores.")]


@app.command()
def maintain(
    tables: Tables = None,
    only: Annotated[list[Step] | None, typer.Option("--only", help="Do this step alone (may be repeated).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Keep the tables healthy: drop what is past its retention, compact small files, expire snapshots, remove orphans.

    Safe beside running writers, and again is harmless: a run that was stopped is finished by the next. A snapshot that must
    stay is tagged first: lakehouse tag TABLE NAME. What each step does and how often to run it: docs/runbook-maintenance.md.
    """
    steps = [step.value for step in only or ()]
    with telling() as say:
        reports = list(maintain_tables(lake(), tables or (), steps, dry_run=dry_run, say=say))
    if as_json:
        print_json([msgspec.to_builtins(r) for r in reports])
    else:
        _tell(reports, dry_run=dry_run)
    if problems := [r for r in reports if r.problem]:
        raise Retryable("; ".join(f"{r.step}: {r.problem}" for r in problems))


def _tell(reports: Iterable[StepReport], *, dry_run: bool) -> None:
    rows = [[r.table, r.step, _figures(r.figures), f"{r.seconds:.2f}"] for r in reports if any(r.figures.values())]
    if rows:
        print_rows(["table", "step", "would be done" if dry_run else "done", "seconds"], rows)
    else:
        out.print("Nothing was to be done: the tables are healthy.")


def _figures(figures: dict[str, int]) -> str:
    def figure(name: str, value: int) -> str:
        return size(value) if name == "bytes" else f"{value:,} {name.replace('_', ' ')}"

    return ", ".join(figure(name, value) for name, value in figures.items() if value)


@app.command()
def tag(
    table: Name,
    name: Tag,
    snapshot: Annotated[
        int | None, typer.Option("--snapshot", help="A snapshot of: lakehouse show TABLE (default: now).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Pin a snapshot under a name, so that it never expires: the input of a report, what an auditor was shown."""
    pinned = tag_snapshot(lake(), table, name, snapshot)
    told: dict[str, Any] = {"table": table, "tag": name, "snapshot_id": pinned}
    if as_json:
        print_json(told)
    else:
        out.print(f"{table}: {name} is snapshot {pinned}; ask it: lakehouse sql ... --as-of {pinned}", soft_wrap=True)


@app.command()
def untag(table: Name, name: Tag, as_json: AsJson = False) -> None:
    """Remove a tag: its snapshot expires as any other."""
    remove_tag(lake(), table, name)
    if as_json:
        print_json({"table": table, "tag": name})
    else:
        out.print(f"{table}: {name} is no tag any more", soft_wrap=True)
