"""The command `revenue`: the books read in three ways."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

import typer

from lakehouse.cli.app import AsJson, app, lake, out, print_json, print_rows
from lakehouse.cli.explore import parse_as_of
from lakehouse.errors import UsageError
from lakehouse.ledger import read


class Reading(StrEnum):
    """How the books are read."""

    BOOKED = "booked"
    RESTATED = "restated"
    AS_KNOWN = "as-known"


class Basis(StrEnum):
    """What counts as revenue."""

    BILLED = "billed"
    CASH = "cash"


class Grain(StrEnum):
    """What a row is."""

    MONTH = "month"
    DAY = "day"
    TYPE = "type"


def parse_month(value: str | None) -> tuple[int, int] | None:
    """`--month`: year and month of `2026-02`.

    Raises:
        UsageError: it is not one.
    """
    if value is None:
        return None
    if not (found := re.fullmatch(r"(\d{4})-(0[1-9]|1[0-2])", value)) or found[1] == "0000":
        raise UsageError(f"--month {value!r} is not a month like 2026-02")
    return int(found[1]), int(found[2])


@app.command()
def revenue(
    reading: Annotated[
        Reading, typer.Option("--reading", help="booked, restated or as-known.", show_choices=False)
    ] = Reading.BOOKED,
    basis: Annotated[
        Basis | None, typer.Option("--basis", help="billed or cash (default: both, never added).", show_choices=False)
    ] = None,
    month: Annotated[str | None, typer.Option("--month", help="Only this month, e.g. 2026-02.")] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="Only what was recorded by this time (UTC): an old report again.")
    ] = None,
    by: Annotated[
        Grain, typer.Option("--by", help="A row a month, day, or type (month and entry type).", show_choices=False)
    ] = Grain.MONTH,
    as_json: AsJson = False,
) -> None:
    """Read the revenue ledger: sums in minor units, by period, basis and currency.

    booked: each entry on the day it was posted to; a closed day never moves. restated: each on the day whose revenue it changes,
    so that a refund lowers the month of the sale. as-known: restated, as it was known at a time. docs/revenue.md explains them.

    Examples:

      lakehouse revenue --reading restated --basis cash --month 2026-02

      lakehouse revenue --reading as-known --at 2026-03-01T00:00:00Z --basis cash --month 2026-02 --json
    """
    moment = parse_as_of(at)
    if isinstance(moment, int):
        raise UsageError(f"--at {at!r} is not a time like 2026-03-01T12:00:00Z")
    found = read(lake(), reading.value, basis=basis.value if basis else None, month=parse_month(month), at=moment, grain=by.value)
    if as_json:
        print_json(found)
        return
    columns = ["day" if by is Grain.DAY else "month", "basis", "currency"]
    columns += ["entry_type"] if by is Grain.TYPE else []
    columns += ["amount_minor", "tax_minor", "entries"] + (["closed"] if reading is Reading.BOOKED else [])
    print_rows(columns, [[row[c] for c in columns] for row in found["rows"]])
    if not found["rows"]:
        out.print("[dim]no entries[/]")
    until = found["at"] or found["known_until"]
    how = "as recorded by" if found["at"] else "complete up to"
    out.print(f"\n[dim]days of {found['time_zone']}; {how} {until:%Y-%m-%d %H:%M:%S}Z[/]")
