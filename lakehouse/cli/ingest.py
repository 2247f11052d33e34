"""The command `ingest`: sources to raw tables, once or for as long as it runs."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from lakehouse import metrics, parts
from lakehouse.cli.app import AsJson, app, err, lake, out, print_json, print_rows
from lakehouse.cli.operate import Tables, telling
from lakehouse.lake import Lake
from lakehouse.services import Services, find_services
from lakehouse.settings import Settings


@app.command()
def ingest(
    tables: Tables = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", help="Go on until Ctrl-C or SIGTERM, as one of any number of processes that share the topics' partitions."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Commit what the sources (Kafka topics, CRM) hold now to the raw tables, from the tables' own positions on.

    With --follow it goes on with the Kafka topics until it is told to stop; then it commits what it has read, leaves, and ends
    with 0. A batch ends by LAKEHOUSE_INGEST_ROWS, _BYTES or _SECONDS; --json prints a line for each. Read docs/ingestion.md.
    """
    opened = lake()
    services = find_services(opened.settings)
    try:
        if follow:
            _follow(opened, services, tables or (), as_json)
        else:
            _drain(opened, services, tables, as_json)
    finally:
        metrics.dump_if_asked(opened.settings)


def _drain(opened: Lake, services: Services, tables: list[str] | None, as_json: bool) -> None:
    if not tables and _no_crm(opened.settings):
        tables = [name for name in parts.writers().SOURCES if name not in parts.writers().CRM_SOURCES]
        err.print("no CRM yet (lakehouse demo makes one, or set LAKEHOUSE_CRM_URL): left out", soft_wrap=True)
    rows = 0
    with telling() as say:

        def told(batch: Any) -> None:
            nonlocal rows
            rows += batch.rows
            say(f"{batch.table}: {rows:,} rows committed")

        batches = [msgspec.to_builtins(b) for b in parts.writers().ingest(opened, services, tables or (), told)]
    if as_json:
        print_json(batches)
        return
    print_rows(
        ["table", "snapshot", "rows", "payload bytes"],
        [[b["table"], str(b["snapshot_id"] or "-"), b["rows"], b["payload_bytes"]] for b in batches],
    )
    if not rows:
        out.print("\nNothing was new: the raw tables hold all that the sources do.")


def _follow(opened: Lake, services: Services, tables: list[str] | tuple[str, ...], as_json: bool) -> None:
    stop = threading.Event()
    rows = 0
    with _stopped_by_signals(stop), telling() as say:
        if port := metrics.serve(opened.settings):
            err.print(f"metrics      http://{opened.settings.metrics_host}:{port}/metrics", soft_wrap=True)

        def told(batch: Any) -> None:
            nonlocal rows
            rows += batch.rows
            if as_json:
                sys.stdout.write(json.dumps(msgspec.to_builtins(batch)) + "\n")
                sys.stdout.flush()
            say(f"{batch.table}: {rows:,} rows committed")

        parts.writers().follow(opened, services, stop, tables, told)
    if not as_json:
        out.print(f"stopped; {rows:,} rows committed")


@contextlib.contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and Ctrl-C set `stop`, so that what was read is committed; a second one ends it at once."""

    def on_signal(_number: int, _frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _no_crm(settings: Settings) -> bool:
    """Whether the CRM is the embedded one and no demo has made it: `lakehouse up` alone needs none."""
    return settings.crm_url is None and not Path(settings.crm_database_url.removeprefix("sqlite:///")).exists()
