"""The command `audit`: is what a table says what a second derivation says?"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
import typer

from lakehouse import metrics
from lakehouse.audit import Audited, refuse_disagreement
from lakehouse.audit import audit as derive_again
from lakehouse.cli.app import AsJson, app, lake, out, print_json, print_rows
from lakehouse.cli.explore import parse_as_of
from lakehouse.errors import UsageError


@app.command()
def audit(
    name: Annotated[str, typer.Argument(metavar="AUDIT", help="An audit of the folder audits/, e.g. attribution.")],
    sample: Annotated[int, typer.Option(min=1, help="Rows that are derived again.")] = 10_000,
    seed: Annotated[int, typer.Option(help="The same seed picks the same rows.")] = 0,
    days: Annotated[
        int | None, typer.Option(min=1, help="Look at the last days up to the newest row (default: 30, without --from, --to).")
    ] = None,
    start: Annotated[datetime | None, typer.Option("--from", formats=["%Y-%m-%d"], help="First day (UTC).")] = None,
    end: Annotated[datetime | None, typer.Option("--to", formats=["%Y-%m-%d"], help="The day after the last one (UTC).")] = None,
    at_least: Annotated[float, typer.Option(min=0, max=1, help="Exit 3 if a smaller share agrees.")] = 0.999,
    as_of: Annotated[
        str | None,
        typer.Option("--as-of", help="Audit all tables as they were at a time (UTC), or at a snapshot of one of them."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Derive a random sample of a table's rows again, by other code than the one that wrote them, and say what share agrees.

    `lakehouse audit attribution` asks of each event whose it is and which plan was in force, from the versions of the CRM's rows,
    the identify events and the plan timeline. What `lakehouse run` has not taken up yet disagrees, so run that first. Of all rows
    of the window it says how many have which outcome. With LAKEHOUSE_METRICS_FILE both figures are written as metrics.
    """
    if days is not None and (start or end):
        raise UsageError("--days looks back from the newest row: give it, or --from and --to")
    since, until = (at and at.replace(tzinfo=UTC) for at in (start, end))
    window: dict[str, Any] = {"since": since, "until": until} if start or end else {"days": days or 30}
    opened = lake()
    found = derive_again(opened, name, sample=sample, seed=seed, as_of=parse_as_of(as_of), **window)
    metrics.dump_if_asked(opened.settings)
    if as_json:
        print_json({**msgspec.to_builtins(found), "at_least": at_least})
    else:
        _tell(found)
    refuse_disagreement(found, at_least)


def _tell(found: Audited) -> None:
    rows = [[o, v.rows, f"{v.share:.4%}", v.checked, v.checked - v.agree] for o, v in found.outcomes.items()]
    print_rows(["outcome", "rows", "share", "derived again", "disagree"], rows, title=found.table)
    out.print(f"\n{found.agree:,} of {found.checked:,} rows agree ({found.share:.4%}).")
    if found.examples:
        told = [[f"{e.get('topic')}/{e.get('partition')}@{e.get('offset')}", _differs(e)] for e in found.examples]
        print_rows(["rows that do not, e.g.", "stored, derived"], told)


def _differs(example: dict[str, Any]) -> str:
    if not example["derived"]:
        return "derived not at all, or more than once"
    return "; ".join(f"{c}: {v['stored']}, {v['derived']}" if v else c for c, v in example["differs"].items())
