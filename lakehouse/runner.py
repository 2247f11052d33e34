"""Running transforms: plan on a consistent cut of the inputs, build, stage, check, and commit with the positions reached.

Each table advances by what is new for it: rows of its driver between its own positions and the cut. Those rows are
inserted (`insert`), or name the keys whose rows are computed again from all their versions (`merge`), so the same
transform serves the smallest batch and a full rebuild. Running a range again is harmless.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
from pyiceberg.table import Table

from lakehouse import metrics
from lakehouse.builds import BUILDERS
from lakehouse.checks import check_staged
from lakehouse.commit import Change, commit
from lakehouse.cuts import bounded, consistent_cut
from lakehouse.errors import Fenced, LakehouseError, Replan, Retryable, UsageError
from lakehouse.lake import Lake, ignored_records
from lakehouse.plans import Pinned, Plan
from lakehouse.positions import Vector, vector_of
from lakehouse.queries import connect
from lakehouse.transforms import Transform, load_transforms, upstream

MAX_PLANS = 20

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """What one run of one table did. rows: written; rejected: new dead letters; caught_up: nothing is left to do."""

    table: str
    snapshot_id: int | None
    new_input_rows: int = 0
    rows: int = 0
    rejected: int = 0
    files_added: int = 0
    files_removed: int = 0
    seconds: float = 0.0
    caught_up: bool = True


def run_table(lake: Lake, name: str, transforms: Mapping[str, Transform] | None = None) -> Report:
    """Advance one table by at most one micro-batch of its driver.

    Raises:
        Fenced, Replan, RolledBack, ChecksFailed, Terminal: see lakehouse.errors; nothing was published.
    """
    transforms = transforms or load_transforms(lake.settings.transforms_dir, lake.declarations)
    if name not in transforms:
        raise UsageError(f"{name} has no transform: writers fill it (lakehouse ingest)")
    return planned_again(lambda: _run_once(lake, name, transforms)[0])


def take_up_again(
    lake: Lake, name: str, coordinates: pa.Table, transforms: Mapping[str, Transform]
) -> tuple[Report, list[pa.Table]]:
    """Let one table work on raw records that its positions have passed; they stay where they are.

    coordinates: columns topic, partition, offset, of rows of its driver. Again is harmless: a row that is there stays.

    Returns:
        The report, and what the transform still refuses (columns topic, partition, offset, received_at, reason, detail).

    Raises:
        Retryable: an input is ahead of the others, so that its rows could not be seen; run them first.
    """
    return planned_again(lambda: _run_once(lake, name, transforms, coordinates), (Replan, Fenced))


def planned_again(attempt: Callable[[], T], outdated: tuple[type[LakehouseError], ...] = (Replan,)) -> T:
    """The attempt's result; it is made again while what it planned on was outdated before it could commit."""
    for number in range(MAX_PLANS):
        try:
            return attempt()
        except outdated:
            if number == MAX_PLANS - 1:
                raise
    raise AssertionError("unreachable")


def _run_once(
    lake: Lake, name: str, transforms: Mapping[str, Transform], again: pa.Table | None = None
) -> tuple[Report, list[pa.Table]]:
    declared, transform = lake.declaration(name), transforms[name]
    cut, pinned = consistent_cut(lake, upstream(declared, transform), transforms)
    if again is not None:
        _refuse_unseen(name, pinned)
    return advance(lake, name, transform, cut, pinned, again)


def advance(
    lake: Lake, name: str, transform: Transform, cut: Vector, pinned: Pinned, again: pa.Table | None = None
) -> tuple[Report, list[pa.Table]]:
    """Advance one table by at most one micro-batch of its driver, with these inputs, to at most these positions.

    Returns:
        The report, and in a replay (`again`) what the transform still refuses.
    """
    started = time.monotonic()
    declared = lake.declaration(name)
    table = lake.open_for_write(name)
    current = table.current_snapshot()
    expected = vector_of(table.metadata, name)
    driver = declared.build.driver
    topics = {topic for topic, _ in vector_of(pinned[driver][0].metadata, driver)} if driver else set()
    # a merge reads all versions of its keys and cannot stop halfway; what reads new rows alone takes them in slices
    slice_rows = sum(cut.values()) if declared.build.mode in ("merge", "history") else lake.settings.batch_rows
    reached, caught_up = bounded(expected, cut, topics, slice_rows)
    if again is not None:
        reached = dict(expected)
    elif current is not None and all(expected.get(k, 0) >= v for k, v in reached.items()):
        _tell_ignored(name, table)
        return Report(name, None, seconds=time.monotonic() - started), []
    reached = {k: max(v, expected.get(k, 0)) for k, v in reached.items()}
    with connect(lake.settings) as connection:
        plan = Plan(
            lake,
            declared,
            transform,
            table,
            current.snapshot_id if current else None,
            expected,
            reached,
            pinned,
            connection,
            caught_up,
            again,
        )
        staged = BUILDERS[declared.build.mode](plan)
        check_staged(connection, declared, staged.add)
        done = commit(
            table,
            lake.run,
            Change(
                consumer=name,
                expected={k: expected.get(k, 0) for k in reached},
                reached=reached,
                add=staged.add,
                remove=staged.remove,
                rewrite=True,
                base=plan.base,
                scope=staged.scope,
                inputs=plan.snapshots(),
                note=staged.note,
            ),
        )
    _tell_ignored(name, table)
    report = Report(
        name,
        done.snapshot_id,
        staged.new_input_rows,
        staged.rows,
        staged.rejected,
        len(staged.add),
        len(staged.remove),
        time.monotonic() - started,
        caught_up,
    )
    return report, plan.refused


def _tell_ignored(name: str, table: Table) -> None:
    if count := ignored_records(table):
        metrics.IGNORED.labels(name).set(count)


def _refuse_unseen(name: str, pinned: Pinned) -> None:
    """A replay needs its inputs as they are now: one pinned at an older snapshot may lack the rows that were just replayed."""
    for source, (table, snapshot) in pinned.items():
        current = table.current_snapshot()
        if not source.startswith("raw.") and current is not None and current.snapshot_id != snapshot:
            raise Retryable(f"{name}: its input {source} is ahead of the others; run those first: lakehouse run")


def run(lake: Lake, names: Sequence[str] = (), on_report: Callable[[Report], None] | None = None) -> list[Report]:
    """Advance the tables (default: all), in the order of their inputs, until each has caught up with its inputs."""
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    for name in names:
        lake.declaration(name)
    reports = []
    for name in transforms:
        if names and name not in names:
            continue
        while True:
            report = run_table(lake, name, transforms)
            reports.append(report)
            if on_report:
                on_report(report)
            if report.caught_up:
                break
    return reports
