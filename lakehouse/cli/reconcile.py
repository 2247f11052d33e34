"""What others say of our billing: `reconcile` compares with Stripe's API, `compare-vendor` with the connector's tables."""

from __future__ import annotations

import contextlib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape

from lakehouse import parts
from lakehouse.cli.app import AsJson, app, counted, lake, out, print_json, print_rows
from lakehouse.cli.operate import telling, until_stopped
from lakehouse.cli.replay import DAY_OR_TIME, utc
from lakehouse.errors import ChecksFailed, UsageError
from lakehouse.jobs import refuse_lasting
from lakehouse.services import find_services
from lakehouse.settings import load_settings


@app.command()
def reconcile(
    since: Annotated[
        datetime | None,
        typer.Option(
            formats=DAY_OR_TIME, help="List events from then on, at most 30 days back (default: where the last run ended)."
        ),
    ] = None,
    events: Annotated[bool, typer.Option("--events/--no-events", help="Look for missed events.")] = True,
    objects: Annotated[
        list[str] | None,
        typer.Option(
            "--objects", metavar="TYPE", help="Sweep all objects of this type, however old: all, customer, invoice, ..."
        ),
    ] = None,
    account: Annotated[str | None, typer.Option(help="A connected account (default: the one that the key belongs to).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only compare; exit 3 if anything differs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the lake with Stripe's API; send what never reached us, or differs, through the raw topic; keep every difference.

    It reads within a share of Stripe's rate limit, and goes on where it was interrupted. What it sends is taken up by
    [bold]lakehouse ingest[/] and [bold]lakehouse run[/]; the next reconcile then closes the rows of ops.reconciliation_drift. It
    exits with 3 if a difference outlived its repair.
    """
    opened = lake()
    services = None if dry_run else find_services(opened.settings)
    with telling() as say:
        report = parts.writers().reconcile(
            opened, services, account=account, since=utc(since), events=events, objects=objects or (), say=say
        )
    if as_json:
        print_json(msgspec.to_builtins(report) | {"differences": report.differences})
    else:
        _tell(report, dry_run)
    if dry_run and report.differences:
        raise ChecksFailed(f"{counted(report.differences, 'difference')} to Stripe; without --dry-run they are repaired")
    refuse_lasting(report)


def _tell(report: Any, dry_run: bool) -> None:
    events = report.events
    rows: list[list[Any]] = [["events", events.listed, events.missing, None, events.extra, None, events.sent]]
    rows += [[f"{name}s", s.checked, s.missing, s.differing, s.extra, s.in_flight, s.sent] for name, s in report.objects.items()]
    mode = "live" if report.livemode else "test"
    print_rows(
        ["at Stripe", "compared", "missing here", "different", "only here", "on their way", "sent"],
        rows,
        title=f"account {report.account}, {mode} mode: {counted(report.requests, 'request')}, {report.refused:,} refused (429), "
        f"{report.failed:,} failed and repeated",
    )
    for name, sweep in report.objects.items():
        if sweep.refused:
            out.print(f"\n{counted(sweep.refused, name)} cannot be read by the normaliser: see ops.reconciliation_drift")
    if events.unreachable_from:
        out.print(
            f"\nThe last run ended at {events.unreachable_from}, longer ago than Stripe lists events: sweep the objects too "
            "(--objects all)"
        )
    if dry_run:
        return
    out.print(f"\n{counted(report.resolved, 'earlier difference')} resolved, {report.open:,} open.")
    if any(row[-1] for row in rows):
        out.print(
            "What was sent waits in the raw topic: [bold]lakehouse ingest[/], [bold]lakehouse run[/], then reconcile again."
        )


@app.command("compare-vendor")
def compare_vendor(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The export: TABLE.parquet, TABLE.csv, or a folder TABLE.")],
    account: Annotated[str | None, typer.Option(help="The connected account that was exported (default: our own).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only compare; keep no drift.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the nightly connector's tables with ours, field by field, as of each row's sync; exit 3 if anything differs.

    Differences are kept in ops.reconciliation_drift (source `vendor`) until a later export agrees. When to switch the connector
    off, and the way back: docs/runbook-vendor-cutover.md
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    with telling() as say:
        done = parts.writers().compare_vendor(lake(), folder, account=account, dry_run=dry_run, say=say)
    if as_json:
        print_json({name: msgspec.to_builtins(table) for name, table in done.items()})
    else:
        print_rows(
            ["table", "compared", "missing here", "only here", "different", "on their way", "fields"],
            [
                [
                    name,
                    t.compared,
                    t.missing,
                    t.extra,
                    t.differing,
                    t.in_flight,
                    ", ".join(f"{f} {n}" for f, n in t.fields.items()),
                ]
                for name, t in done.items()
            ],
        )
    if differing := sum(t.differences for t in done.values()):
        raise ChecksFailed(
            f"{counted(differing, 'object')} differ from the vendor's export; who is right: lakehouse reconcile --objects all"
        )


@app.command("stripe-api")
def stripe_api(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 0,
    rate: Annotated[float | None, typer.Option(min=1, help="Refuse with 429 what goes over so many requests a second.")] = 25,
    drop: Annotated[float, typer.Option(min=0, max=1, help="Share of the answers that end in the middle.")] = 0.0,
    fail: Annotated[float, typer.Option(min=0, max=1, help="Share of the requests answered with 500.")] = 0.0,
    delay: Annotated[float, typer.Option(min=0, help="Seconds before each answer.")] = 0.0,
) -> None:
    """Serve the Stripe API of the world that `demo` played, as it stands at its end, until Ctrl-C; for `reconcile` to read."""
    world = load_settings().home / "world"
    if not (world / "journal.json").exists():
        raise UsageError("no world was played here whose Stripe account could be served; play one: lakehouse demo")
    served = parts.simulator().stripe_api(world, port=port, rate_per_second=rate, drop=drop, fail=fail, delay=delay)
    # around all of it: who reads the address may stop us before the next line
    with contextlib.suppress(KeyboardInterrupt), served as (url, key):
        out.print(f"export LAKEHOUSE_STRIPE_API_BASE={escape(url)} LAKEHOUSE_STRIPE_API_KEY={key}", soft_wrap=True)
        out.print("Ctrl-C stops.")
        until_stopped()
