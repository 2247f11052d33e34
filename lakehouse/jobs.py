"""The jobs an orchestrator runs: each is one call, reads its settings from the environment, and can be run again.

Failures are `Retryable` (run it again) or `Terminal` (a person must act): see lakehouse.errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from lakehouse import metrics, parts
from lakehouse.declarations import load_declarations
from lakehouse.errors import ChecksFailed
from lakehouse.lake import open_lake
from lakehouse.runner import run
from lakehouse.services import find_services
from lakehouse.settings import load_settings
from lakehouse.transforms import comes_after, load_transforms


def sources() -> list[str]:
    """The raw tables that writers fill."""
    return list(parts.writers().SOURCES)


def tables() -> dict[str, list[str]]:
    """The tables that transforms fill, in order: {table: the tables that come before it}; no I/O beyond the project's files."""
    settings = load_settings()
    declarations = load_declarations(settings.catalog_dir)
    return {
        name: list(comes_after(declarations[name], transform))
        for name, transform in load_transforms(settings.transforms_dir, declarations).items()
    }


def ingest_source(name: str) -> list[dict[str, Any]]:
    """Commit what one source holds now to its raw table; returns the batches."""
    settings = load_settings()
    batches = parts.writers().ingest(open_lake(settings), find_services(settings), [name])
    return [msgspec.to_builtins(b) for b in batches]


def reconcile(events: bool = True, objects: Sequence[str] = ()) -> dict[str, Any]:
    """Compare our Stripe account with the lake and send what is missing or differs through the raw topic; returns the report.

    Raises:
        ChecksFailed: what an earlier run had sent is still not there.
    """
    settings = load_settings()
    report = parts.writers().reconcile(open_lake(settings), find_services(settings), events=events, objects=objects)
    refuse_lasting(report)
    found: dict[str, Any] = msgspec.to_builtins(report)
    return found


def refuse_lasting(report: Any) -> None:
    """Raise ChecksFailed if a reconciliation found again what an earlier one had found and sent."""
    if report.lasting:
        raise ChecksFailed(
            f"{report.lasting} differences to Stripe outlived their repair; was what was sent taken up (lakehouse ingest, "
            'lakehouse run)? See: lakehouse sql "SELECT * FROM ops.reconciliation_drift WHERE resolved_at IS NULL"'
        )


def run_table(name: str) -> list[dict[str, Any]]:
    """Advance one table until it has caught up with its inputs; returns the reports."""
    settings = load_settings()
    reports = run(open_lake(settings), [name])
    metrics.dump_if_asked(settings)
    return [msgspec.to_builtins(r) for r in reports]


def backfill(start: str, end: str, tables: Sequence[str] = (), slice_days: int = 1) -> list[dict[str, Any]]:
    """Make the days [start, end) (ISO dates, UTC) of the tables (default: all) again from their inputs; returns the slices."""
    from lakehouse.backfill import backfill as make_again

    since, until = (datetime.fromisoformat(day).replace(tzinfo=UTC) for day in (start, end))
    made = make_again(open_lake(load_settings()), since, until, tables, slice_days=slice_days)
    return [msgspec.to_builtins(s) for s in made]


def maintain_tables(steps: Sequence[str]) -> list[dict[str, Any]]:
    """Do maintenance steps for every table that exists; returns the reports.

    Raises:
        Retryable: naming the tables for which a step could not be done; the others are done.
    """
    from lakehouse.errors import Retryable
    from lakehouse.maintenance.run import maintain

    reports = list(maintain(open_lake(load_settings()), steps=steps))
    if problems := [f"{r.step}: {r.problem}" for r in reports if r.problem]:
        raise Retryable("; ".join(problems))
    return [msgspec.to_builtins(r) for r in reports]


def audit(name: str, at_least: float = 0.999) -> dict[str, Any]:
    """Derive 10,000 rows of the last 30 days again and compare them (`lakehouse audit`); returns what was found.

    Raises:
        ChecksFailed: a smaller share than `at_least` agrees.
    """
    from lakehouse.audit import audit as derive_again
    from lakehouse.audit import refuse_disagreement

    settings = load_settings()
    found = derive_again(open_lake(settings), name, sample=10_000, seed=datetime.now(UTC).toordinal(), days=30)
    metrics.dump_if_asked(settings)
    refuse_disagreement(found, at_least)
    told: dict[str, Any] = msgspec.to_builtins(found)
    return told


def scan_table(name: str) -> dict[str, Any]:
    """Hold the published table to its Soda contract; returns the report.

    Raises:
        ChecksFailed: naming each check that failed or could not be evaluated.
    """
    from lakehouse.scan import scan

    report = scan(open_lake(load_settings()), name)
    if report.failed:
        detail = "; ".join(f"{check}: {found}" for check, found in report.failed)
        raise ChecksFailed(f"{name}: the published table breaks its contract: {detail}")
    return {"table": report.table, "passed": report.passed}
