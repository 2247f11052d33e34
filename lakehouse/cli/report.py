"""The command `report`: one HTML page over everything that the lake says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from lakehouse.cli.app import AsJson, app, lake, out, print_json, size
from lakehouse.cli.explore import road
from lakehouse.cli.operate import telling, truth
from lakehouse.completeness import standings
from lakehouse.errors import UsageError
from lakehouse.lake import Lake
from lakehouse.transforms import load_transforms

NO_TRUTH = (
    "Whether each plan is the right one cannot be told here: this lake holds no simulated world to compare with. What is stored "
    "is counted beside."
)


@app.command()
def report(
    to: Annotated[Path | None, typer.Option("--to", help="The file to write (default: report.html in LAKEHOUSE_HOME).")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a report as one HTML page: road, attribution, revenue, MRR, upgrades, ARPA, use without paying, use against bills.

    The page needs nothing else: no server, no network, no script. What is empty, or not built yet, says so.

    Example: lakehouse report --to report.html
    """
    try:
        from lakehouse.report import render  # Vega's engine takes a while to import
    except ModuleNotFoundError as error:
        raise UsageError(f"the report needs {error.name}; install it: pip install 'streamforge-lakehouse[report]'") from None

    opened = lake()
    target = to or opened.settings.home / "report.html"
    if target.is_dir():
        raise UsageError(f"--to {target}: a folder; name a file in it")
    with telling() as say:
        say("comparing with the truth")
        compared = _compared(opened)
        say("reading the state of the tables")
        rows = _received(opened, road(opened))
        page = render(opened, rows, compared, say)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, "utf-8")
    if as_json:
        print_json({"file": str(target), "bytes": target.stat().st_size})
        return
    out.print(f"wrote {escape(str(target))} ({size(target.stat().st_size)}): open it in a browser", soft_wrap=True)


def _compared(lake: Lake) -> dict[str, Any] | str:
    """What `verify` finds, or why it cannot be told."""
    try:
        return truth(lake) or NO_TRUTH
    except (OSError, UsageError) as error:  # a world that an older version wrote lacks files
        return f"Not compared with the truth: {str(error).splitlines()[0]}"


def _received(lake: Lake, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the road, each with up to when all that it reads was received: the least of its sources."""
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    told = standings(lake, [r["table"] for r in rows if r["exists"]], transforms)
    for row in rows:
        known = list(told[row["table"]].received_until.values()) if row["exists"] else []
        row["received_until"] = min((k for k in known if k), default=None) if all(known) else None
    return rows
