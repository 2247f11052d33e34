"""The shell of the command line: the app, how errors become messages and exit codes, how rows are printed.

Data goes to stdout, progress to stderr. Exit codes: 0 fine, 1 failed, 2 usage, 3 checks failed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from lakehouse.lake import Lake, open_lake
from lakehouse.settings import load_settings

app = typer.Typer(
    name="lakehouse",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Billing and product usage as one trustworthy dataset in Apache Iceberg.\n\n"
    'Begin with [bold]lakehouse demo[/], then ask: [bold]lakehouse sql "SELECT * FROM marts.upgrade_funnel"[/]. '
    "Exit codes: 0 fine, 1 failed, 2 usage, 3 checks failed.",
)

# where there is no terminal to fit into (a pipe, a log), tables are wide enough not to fold
out = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
err = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def lake() -> Lake:
    """The lake of the settings in the environment."""
    return open_lake(load_settings())


def plain(value: Any) -> Any:
    """A value as JSON can hold it: times ISO-8601 with zone, bytes as text or hex, decimals as text."""
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.hex()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    return value


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Rows as a table for people on stdout: numbers to the right, NULL shown as such."""
    found = [list(row) for row in rows]
    table = RichTable(title=title, title_justify="left", header_style="bold", show_edge=False, pad_edge=False)
    for i, column in enumerate(columns):
        numeric = any(isinstance(r[i], int | float | Decimal) for r in found)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=i == 0)
    for row in found:
        table.add_row(*(cell(v) for v in row))
    out.print(table)


def cell(value: Any) -> str:
    """One value for people: thousands separated, times without microseconds where there are none."""
    if value is None:
        return "[dim]NULL[/]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds" if value.microsecond == 0 else "milliseconds").replace("+00:00", "Z")
    return escape(str(plain(value)) if not isinstance(value, str) else value)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


@app.callback()
def _main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what the libraries do, to stderr.")] = False,
) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    # pyiceberg warns of things that are so by design here (no sort-on-write, extra table properties)
    logging.getLogger("pyiceberg").setLevel(logging.INFO if verbose else logging.ERROR)
