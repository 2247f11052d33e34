"""`lakehouse maintain`: the steps, in the order in which one makes work for the next, for each table; again is harmless."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pyiceberg.table import Table

from lakehouse import metrics
from lakehouse.cuts import consistent_cut
from lakehouse.declarations import Declaration
from lakehouse.errors import LakehouseError, Retryable, RolledBack
from lakehouse.lake import Lake
from lakehouse.maintenance.compact import compact, plan_compaction
from lakehouse.maintenance.expire import expire, plan_expiry, remove_expired_files
from lakehouse.maintenance.manifests import rewrite_manifests, small_manifests
from lakehouse.maintenance.orphans import remove_orphans
from lakehouse.maintenance.retention import drop_outdated, outdated, would_drop
from lakehouse.transforms import load_transforms, upstream

HOUR_MS = 3_600_000

Say = Callable[[str], None]


@dataclass(frozen=True)
class StepReport:
    """What one step did to one table (or would do): figures by name, all 0 if there was nothing to do; or why it could not."""

    table: str
    step: str
    figures: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    problem: str | None = None


@dataclass(frozen=True)
class _Job:
    lake: Lake
    declared: Declaration
    table: Table
    needed: Collection[int]
    dry_run: bool
    say: Say


def _retention(job: _Job) -> dict[str, int]:
    if job.dry_run:
        return would_drop(job.lake, job.table, job.declared, outdated(job.table, job.declared, datetime.now(UTC)))
    return drop_outdated(job.lake, job.table, job.declared)


def _compact(job: _Job) -> dict[str, int]:
    if job.dry_run:
        bins = plan_compaction(job.table, job.lake.settings)
        return {"files": sum(map(len, bins)), "bytes": sum(f.file_size_in_bytes for b in bins for f in b)}
    return compact(job.lake, job.declared, job.table, job.say)


def _manifests(job: _Job) -> dict[str, int]:
    return {"manifests": small_manifests(job.table) if job.dry_run else rewrite_manifests(job.table, job.lake.run)}


def _expire(job: _Job) -> dict[str, int]:
    keep = job.declared.keep_snapshots
    if job.dry_run:
        planned = plan_expiry(job.table, keep, job.needed, int(time.time() * 1000))
    else:
        planned = expire(job.table, job.lake.run, keep, job.needed)
    wait = int(job.lake.settings.expired_files_hours * HOUR_MS)
    removed = remove_expired_files(job.table, wait, dry_run=job.dry_run)
    return {"snapshots": len(planned.snapshots), "files_written_down": len(planned.files), "files_removed": removed}


def _orphans(job: _Job) -> dict[str, int]:
    settings = job.lake.settings
    guard = int(settings.orphan_hours * HOUR_MS)
    files, size = remove_orphans(job.table, job.lake.run, settings, guard, dry_run=job.dry_run)
    metrics.ORPHAN_BYTES.labels(job.declared.table).set(size)
    return {"files": files, "bytes": size}


STEPS: dict[str, Callable[[_Job], dict[str, int]]] = {
    "retention": _retention,
    "compact": _compact,
    "manifests": _manifests,
    "expire": _expire,
    "orphans": _orphans,
}


def maintain(
    lake: Lake, names: Sequence[str] = (), steps: Collection[str] = (), *, dry_run: bool = False, say: Say = lambda _: None
) -> Iterator[StepReport]:
    """Do the steps (default: all) for the tables (default: all that exist); reports come as the steps end.

    Each step commits by itself and leaves the table whole, so a run can be stopped anywhere and run again. A table that was
    rolled back behind our back, on which other commits always came first, or whose outdated rows are not read yet, is reported
    and does not hold up the others.

    Raises:
        UsageError: a table is not declared, or not created yet.
    """
    chosen = [name for name in STEPS if not steps or name in steps]
    tables = [".".join(lake.load(name).name()) for name in names] or list(lake.existing())
    # tables that are appended to are read by offset, at their present state
    cuts = "expire" in chosen and any(lake.declaration(name).build.mode != "append" for name in tables)
    needed = _needed(lake) if cuts else {}
    for name in tables:
        for step in chosen:
            say(f"{name}: {step}")
            started = time.monotonic()
            figures: dict[str, int] = {}
            problem = None
            try:
                job = _Job(lake, lake.declaration(name), lake.load(name), needed.get(name, ()), dry_run, say)
                figures = STEPS[step](job)
            except (Retryable, RolledBack) as error:
                problem = str(error)
            yield StepReport(name, step, figures, round(time.monotonic() - started, 3), problem)


def _needed(lake: Lake) -> dict[str, set[int]]:
    """The snapshots that a table built from several inputs would read now: {table: snapshot ids}. They must not expire."""
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    existing = set(lake.existing())
    found: dict[str, set[int]] = {}
    for name, transform in transforms.items():
        inputs = upstream(lake.declarations[name], transform)
        if len(inputs) < 2 or not existing.issuperset(inputs):
            continue
        try:
            _, pinned = consistent_cut(lake, inputs, transforms)
        except LakehouseError:  # no cut now: nothing that could be kept for it
            continue
        for read, (_, snapshot) in pinned.items():
            if snapshot is not None:
                found.setdefault(read, set()).add(snapshot)
    return found
