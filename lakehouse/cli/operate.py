"""Commands that do: demo, up, run, verify, scan, rollback."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from pydantic import SecretStr
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lakehouse import metrics, parts
from lakehouse.cli.app import AsJson, app, err, lake, out, print_json, print_rows
from lakehouse.errors import ChecksFailed, UsageError
from lakehouse.first_written import first_written
from lakehouse.lake import Lake
from lakehouse.live import rows_in
from lakehouse.queries import query
from lakehouse.rollback import rollback_table
from lakehouse.runner import run as run_tables
from lakehouse.services import (
    Services,
    embedded_services,
    find_services,
    local_profile,
    running_services,
    starts_local_services,
)
from lakehouse.settings import Settings, load_settings
from lakehouse.transforms import load_transforms

Say = Callable[..., None]
SECONDS_BETWEEN_LINES = 3.0

Tables = Annotated[list[str] | None, typer.Argument(metavar="TABLE", help="Tables (default: all).")]


@contextlib.contextmanager
def only_one(settings: Settings) -> Iterator[None]:
    """Hold the home's lock, so that two demos do not deliver the same world twice."""
    settings.home.mkdir(parents=True, exist_ok=True)
    with (settings.home / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another lakehouse command works on {settings.home}; wait for it, or set LAKEHOUSE_HOME") from None
        yield


@contextlib.contextmanager
def telling() -> Iterator[Say]:
    """Progress on stderr: a moving bar on a terminal, a line every few seconds anywhere else. Gives `say(what, done, total)`."""
    if not err.is_terminal:
        last = [0.0]

        def say_line(what: str, done: int = 0, total: int = 0) -> None:
            if time.monotonic() - last[0] >= SECONDS_BETWEEN_LINES:
                last[0] = time.monotonic()
                err.print(f"{what} ({done:,} of {total:,})" if total else what, markup=False)

        yield say_line
        return
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)

        def say(what: str, done: int = 0, total: int = 0) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield say


@app.command()
def demo(
    customers: Annotated[int, typer.Option(min=20, help="Customers of the simulated world.")] = 150,
    days: Annotated[int, typer.Option(min=20, help="Days that are played.")] = 60,
    events: Annotated[int, typer.Option(min=1_000, help="Unique product events.")] = 520_000,
    seed: Annotated[int, typer.Option(help="Seed of the world: the same seed plays the same world.")] = 7,
    rounds: Annotated[int, typer.Option(min=1, help="In how many micro-batches the world is played.")] = 6,
    withhold: Annotated[
        int,
        typer.Option(min=0, help="Stripe events of the last weeks that are never delivered, for `lakehouse reconcile` to find."),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Play a company through real parts into the lake: signed webhooks over HTTP, Kafka, a CRM; then compare with its truth.

    It starts an embedded broker and a webhook receiver on free ports and stops them at the end. Run again, it goes on where it
    was interrupted and otherwise changes nothing; `make clean` removes what it left.
    """
    opened = lake()
    settings = opened.settings
    if not settings.all_embedded:
        raise UsageError(
            "the demo writes simulated customers, so it runs in a lake of its own only: unset LAKEHOUSE_PROFILE, _CATALOG_URI, "
            "_WAREHOUSE, _KAFKA_BOOTSTRAP and _CRM_URL (LAKEHOUSE_HOME says where it lives)"
        )
    started = time.monotonic()
    with only_one(settings), telling() as say:
        say("building the world")

        # the receiver checks signatures against the simulated clock; the secret lives as long as this process
        secret = SecretStr(f"whsec_{secrets.token_hex(16)}")
        signed = settings.model_copy(update={"webhook_secrets": [secret]})

        def services(clock: Callable[[], float]) -> AbstractContextManager[Services]:
            return embedded_services(signed, lambda s: parts.writers().receiver(signed, s, clock))

        def after_day(now: datetime) -> None:
            parts.writers().ingest_crm(opened, settings.crm_database_url, seen_at=now)

        def after_round(services: Services, now: datetime) -> None:
            say("committing raw tables")
            parts.writers().ingest(opened, services, seen_at=now)
            run_tables(opened, on_report=lambda r: say(f"building {r.table}"))

        try:
            played = parts.simulator().play(
                settings.home / "world",
                services,
                after_day,
                after_round,
                webhook_secret=secret.get_secret_value(),
                rounds=rounds,
                withhold=withhold,
                progress=say,
                customers=customers,
                days=days,
                product_events=events,
                seed=seed,
            )
        except ValueError as error:  # the folder holds another world: its own message says what to do
            raise UsageError(str(error)) from None
        say("comparing with the truth")
        verdict = _verify(opened)
    seconds = time.monotonic() - started
    if as_json:
        print_json({"played": played, "verify": verdict, "seconds": round(seconds, 1)})
    else:
        _tell_demo(opened, played, verdict, seconds)
    _judge(verdict)


def _tell_demo(lake: Lake, played: dict[str, Any], verdict: dict[str, Any], seconds: float) -> None:
    if played["rounds"]:
        out.print(
            f"Played {played['days']} days of {played['customers']} customers in {played['rounds']} rounds: "
            f"{played['posted']:,} signed webhooks over HTTP, {played['produced']:,} Kafka records, "
            f"{played['crm_changes']:,} CRM changes."
        )
    else:
        out.print("This world was played before: nothing was sent, and nothing changed.")
    counts = [(name, describe_rows(lake, name)) for name in lake.existing()]
    print_rows(["table", "rows"], counts, title="the lake")
    out.print()
    _tell_verdict(verdict)
    me = command()
    out.print(f"\n{seconds:.1f} s. Now ask it something:")
    out.print(f'  {me} sql "SELECT plan, feature, lift FROM marts.upgrade_funnel ORDER BY lift DESC LIMIT 5"', soft_wrap=True)
    out.print(f"  {me} show product.events", soft_wrap=True)


def command() -> str:
    """How the reader can call this command: by its name if that is on the PATH, else by its path."""
    called = Path(sys.argv[0])
    if shutil.which("lakehouse") or called.name != "lakehouse":
        return "lakehouse"
    return str(called.relative_to(Path.cwd())) if called.is_relative_to(Path.cwd()) else str(called)


def describe_rows(lake: Lake, name: str) -> int:
    """Rows of a table by its newest snapshot."""
    current = lake.load(name).current_snapshot()
    return rows_in(current.summary.additional_properties) if current and current.summary else 0


@app.command()
def up(
    secret: Annotated[bool, typer.Option("--show-secret", help="Print the signing secret made for this run.")] = False,
) -> None:
    """Run the webhook receiver, and the embedded Kafka broker unless LAKEHOUSE_KAFKA_BOOTSTRAP names one, until Ctrl-C.

    With LAKEHOUSE_PROFILE=local, and no services named: Apache Kafka and SeaweedFS (S3 and an Iceberg REST catalog), which keep
    their data under LAKEHOUSE_HOME. Other commands of the same profile find the services by themselves.
    """
    made = SecretStr(f"whsec_{secrets.token_hex(16)}")
    if starts_local_services():
        with local_profile() as settings:
            signed = settings if settings.webhook_secrets else settings.model_copy(update={"webhook_secrets": [made]})
            with parts.writers().receiver(signed, find_services(signed), time.time) as url:
                out.print(f"Kafka        {settings.kafka_bootstrap}  (topics {settings.product_topic}, {settings.stripe_topic})")
                out.print(f"S3           {settings.s3_endpoint}  (bucket lake)")
                out.print(f"Iceberg      {settings.catalog_uri}")
                out.print(f"webhooks     {url}")
                if secret and not settings.webhook_secrets:
                    out.print(f"secret       {made.get_secret_value()}")
                out.print("Other shells find them with LAKEHOUSE_PROFILE=local. Ctrl-C stops.")
                until_stopped()
        return
    opened = lake()
    settings = opened.settings
    if settings.kafka_bootstrap:
        with parts.writers().receiver(settings, find_services(settings), time.time) as url:
            out.print(f"webhooks     {url}  (to {settings.stripe_topic} on {settings.kafka_bootstrap}). Ctrl-C stops.")
            until_stopped()
        return
    signed = settings if settings.webhook_secrets else settings.model_copy(update={"webhook_secrets": [made]})
    with embedded_services(signed, lambda s: parts.writers().receiver(signed, s, time.time)) as services:
        out.print(f"Kafka        {services.bootstrap}  (topics {services.product_topic}, {services.stripe_topic})")
        out.print(f"webhooks     {services.webhook_url}")
        if secret and not settings.webhook_secrets:
            out.print(f"secret       {made.get_secret_value()}")
        out.print("The broker keeps its log in memory: run `lakehouse ingest` before you stop it. Ctrl-C stops.")
        until_stopped()


def until_stopped() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


@app.command()
def run(tables: Tables = None, as_json: AsJson = False) -> None:
    """Build the tables from what is new in their inputs, in order, until they have caught up. Again is harmless."""
    opened = lake()
    built = load_transforms(opened.settings.transforms_dir, opened.declarations)
    for name in tables or ():
        if opened.declaration(name).table not in built:
            raise UsageError(f"{name} is not built from other tables; raw tables are filled by: lakehouse ingest")
    with telling() as say:
        reports = run_tables(opened, tables or (), lambda r: say(f"{r.table}: {r.rows:,} rows"))
    metrics.dump_if_asked(opened.settings)
    if as_json:
        print_json([msgspec.to_builtins(r) for r in reports])
        return
    print_rows(
        ["table", "read", "written", "rejected", "files", "seconds"],
        [
            [
                r.table,
                r.new_input_rows,
                r.rows,
                r.rejected,
                f"+{r.files_added} -{r.files_removed}",
                f"{r.seconds:.2f}",
            ]
            for r in reports
        ],
    )
    if not any(r.snapshot_id for r in reports):
        out.print("\nNothing was new: the tables are up to date.")


def truth(lake: Lake) -> dict[str, Any] | None:
    """What differs between the lake and the truth of the world that was played into it; None: none was."""
    if not (lake.settings.home / "world" / "truth" / "truth.json").exists():
        return None
    return parts.simulator().verify(lake.settings.home / "world", lambda text: query(lake, text))


def _verify(lake: Lake) -> dict[str, Any]:
    if (verdict := truth(lake)) is None:
        raise UsageError(f"{lake.settings.home} holds no world to compare with; play one: lakehouse demo")
    return verdict


def _judge(verdict: dict[str, Any]) -> None:
    if verdict["problems"]:
        raise ChecksFailed("the lake differs from the truth: " + "; ".join(verdict["problems"]))


@app.command()
def verify(
    first: Annotated[
        bool, typer.Option("--first", help="Also say how right the events' attribution was when first written, before repairs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the lake with the truth of the world that `demo` played; exit 3 if anything is missing, doubled or wrong.

    With --first it also goes back in time: each event as the snapshot had it that took it up. That is told; what counts is now.
    """
    opened = lake()
    verdict = _verify(opened)
    if first:
        folder = opened.settings.home / "world"
        told = parts.simulator().first_attribution(folder, lambda name, columns: first_written(opened, name, columns))
        verdict["attribution_first_written"] = told
    if as_json:
        print_json(verdict)
    else:
        _tell_verdict(verdict)
    _judge(verdict)


def _tell_verdict(verdict: dict[str, Any]) -> None:
    rows = [
        [
            section if "." in section else section.replace("_", " "),
            ", ".join(f"{_figure(v)} {k.replace('_', ' ')}" for k, v in values.items() if not isinstance(v, dict)),
        ]
        for section, values in verdict.items()
        if isinstance(values, dict)
    ]
    print_rows(["compared with the truth", ""], rows)
    if not verdict["problems"]:  # else the error says them
        out.print("\n[green]all of it agrees[/]")


def _figure(value: float) -> str:
    return f"{value:.6f}" if isinstance(value, float) else f"{value:,}"


@app.command()
def scan(tables: Tables = None, as_json: AsJson = False) -> None:
    """Run the Soda contracts rendered from the declarations on the Iceberg tables; exit 3 if a check fails."""
    from lakehouse.scan import scan as scan_table  # Soda takes a second to import

    opened = lake()
    reports = [scan_table(opened, name) for name in (tables or list(opened.existing()))]
    if as_json:
        print_json([msgspec.to_builtins(r) for r in reports])
    elif not reports:
        out.print("The lake is empty: nothing to scan. Fill it: [bold]lakehouse demo[/]")
    else:
        print_rows(
            ["table", "passed", "failed"], [[r.table, r.passed, ", ".join(n for n, _ in r.failed) or "-"] for r in reports]
        )
    if failed := [r.table for r in reports if r.failed]:
        raise ChecksFailed(f"checks failed on {', '.join(failed)}")


@app.command()
def rollback(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="Name of a table, e.g. product.events.")],
    snapshot: Annotated[int, typer.Argument(metavar="SNAPSHOT", help="A snapshot of the table's history: lakehouse show TABLE.")],
    as_json: AsJson = False,
) -> None:
    """Set a table back to a snapshot together with the positions it had then, so that nothing is lost or read twice."""
    positions = rollback_table(lake(), table, snapshot)
    if as_json:
        print_json({"table": table, "snapshot_id": snapshot, "positions": positions})
        return
    out.print(f"{table} is at snapshot {snapshot} again, and goes on from its positions then:")
    rows = [[f"{topic}", offset] for reached in positions.values() for topic, offset in reached.items()]
    print_rows(["", ""], rows or [["the beginning", None]])


@app.command()
def clean(yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Remove all local state (LAKEHOUSE_HOME) of the embedded profile: the lake, the world, the services' files."""
    settings = load_settings()  # not the lake: a broken declaration must not keep anybody from starting over
    if settings.profile != "embedded":
        raise UsageError("clean removes the embedded profile's folder only")
    home = settings.home
    if not home.exists():
        out.print(f"{escape(str(home))} does not exist: nothing to remove", soft_wrap=True)
        return
    if not any((home / name).is_file() for name in ("lock", "catalog.db", "run/starts")):
        raise UsageError(f"{home} does not look like a lakehouse home (no lock, catalog.db or run/starts); remove it by hand")
    if process := running_services(settings):
        raise UsageError(f"the embedded services of {home} run (process {process}); stop them first")
    if yes or typer.confirm(f"Remove {home} and all that is in it?"):
        with only_one(settings):
            shutil.rmtree(home)
        out.print(f"removed {escape(str(home))}", soft_wrap=True)
