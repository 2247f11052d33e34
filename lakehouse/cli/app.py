"""The shell of the command line: the app, how errors become messages and exit codes, how rows are printed.

Data goes to stdout, progress to stderr. Exit codes: 0 fine, 1 failed, 2 usage, 3 checks failed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any

import typer
from pyarrow import MonthDayNano
from rich import box
from rich.cells import cell_len
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
MAY_NOT_FOLD = 40  # columns

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def lake() -> Lake:
    """The lake of the settings in the environment."""
    return open_lake(load_settings())


def plain(value: Any) -> Any:
    """A value as JSON can hold it: times ISO-8601 with zone, bytes as text or hex, decimals and NaN as text."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, MonthDayNano):
        return interval(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.hex()
    if isinstance(value, Decimal) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def interval(value: Any) -> str:
    """DuckDB's INTERVAL as DuckDB writes it: `1 month 2 days 03:04:05.5`."""
    parts = [f"{n} {unit}{'' if abs(n) == 1 else 's'}" for n, unit in ((value.months, "month"), (value.days, "day")) if n]
    if value.nanoseconds or not parts:
        seconds, nanoseconds = divmod(abs(value.nanoseconds), 10**9)
        fraction = f".{nanoseconds:09d}".rstrip("0").rstrip(".")
        sign = "-" if value.nanoseconds < 0 else ""
        parts.append(f"{sign}{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{fraction}")
    return " ".join(parts)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Rows as a table for people on stdout: numbers to the right, NULL shown as such, no header if no column has a name."""
    found = [list(row) for row in rows]
    if title:
        out.print(f"\n[italic]{escape(title)}[/]")
    table = RichTable(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold", show_edge=False, pad_edge=False, show_header=any(columns)
    )
    whole = _kept_whole(_widths(columns, found))
    for i, column in enumerate(columns):
        known = [r[i] for r in found if r[i] is not None]
        numeric = bool(known) and all(isinstance(v, int | float | Decimal) and not isinstance(v, bool) for v in known)
        table.add_column(escape(column), justify="right" if numeric else "left", overflow="fold", no_wrap=whole[i])
    for row in found:
        table.add_row(*(cell(v) for v in row))
    out.print(table)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[int]:
    """What each column needs for its values in one piece: ids, numbers and times are worth nothing in two; 0 for text."""
    needed = [max([cell_len(c), *(cell_len(cell(r[i])) for r in rows if r[i] is not None)]) for i, c in enumerate(columns)]
    return [n if n <= MAY_NOT_FOLD else 0 for n in needed]


def _kept_whole(widths: Sequence[int]) -> list[bool]:
    """Which columns may not be folded: where not all have room the widest is, and the first only when it is alone."""
    kept = list(widths)
    while any(kept) and not _fits(kept):
        others = [i for i, width in enumerate(kept) if i and width]
        kept[max(others, key=lambda i: kept[i], default=0)] = 0
    return [width > 0 for width in kept]


def _fits(widths: Sequence[int]) -> bool:
    return sum((w or MAY_NOT_FOLD // 2) + 2 for w in widths) - 2 <= out.width


def print_records(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows as a table if that fits, else each row as a list of its columns."""
    found = [list(row) for row in rows]
    if _fits(_widths(columns, found)):
        print_rows(columns, found)
        return
    if not found:
        out.print(escape(", ".join(columns)))
    for number, row in enumerate(found, 1):
        print_rows(["", ""], zip(columns, row, strict=True), title=f"row {number}")


def cell(value: Any) -> str:
    """One value for people: thousands separated, times without microseconds where there are none."""
    if value is None:
        return "[dim]NULL[/]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if value == 0 or 0.001 <= abs(value) < 1e12 else f"{value:.6g}"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds" if value.microsecond == 0 else "milliseconds").replace("+00:00", "Z")
    return escape(str(plain(value)))


def counted(number: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def age(seconds: float) -> str:
    """A duration for people, in its largest unit."""
    for unit, length in (("day", 86_400), ("hour", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}{'s' if unit != 'min' and round(seconds / length) != 1 else ''} ago"
    return f"{seconds:.0f} s ago"


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
