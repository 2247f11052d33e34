"""Backfill: make the rows of a window again from their inputs, whatever the tables hold there now.

A table whose transform has `derive(plan, start, end)` is done in slices of whole days, each a commit of its own that replaces
only what differs: slices can run in any order and at the same time, and again changes nothing. Of any other table the keys that
the window's records touch are made again (lakehouse/runner.py), and a table that is replaced whole is replaced.

A slice that was finished before the command was killed is found in a journal below the home and not made again, if the table
still holds there what it held then and the inputs are the same. The journal goes when the backfill is through.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timedelta
from multiprocessing import get_context
from pathlib import Path

import msgspec
import pyarrow as pa

from lakehouse.checks import check_staged
from lakehouse.commit import Change, commit, scope_of
from lakehouse.content import content_of
from lakehouse.coordinates import COORDINATES, coordinates_sql
from lakehouse.cuts import consistent_cut, raw_roots
from lakehouse.errors import Terminal, UsageError
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.live import files_where
from lakehouse.plans import Plan, count_rows, live_files, stage_with
from lakehouse.positions import vector_of
from lakehouse.predicates import all_of, at_least, below
from lakehouse.queries import connect, empty_sql, fetch, files_sql, quote
from lakehouse.runner import planned_again, run, take_up_again
from lakehouse.settings import Settings
from lakehouse.transforms import Transform, load_transforms, upstream, with_inputs

Say = Callable[[str, int, int], None]


class Slice(msgspec.Struct, frozen=True):
    """One slice of one table. rows, hash: what the table holds there now, None where it is made by keys or whole.

    changed: rows that are new or other than before, or gone; snapshot_id: of the commit, None if nothing differed.
    """

    table: str
    start: datetime
    end: datetime
    rows: int | None = None
    hash: str | None = None
    changed: int = 0
    snapshot_id: int | None = None
    inputs: dict[str, int] = {}


def backfill(
    lake: Lake,
    start: datetime,
    end: datetime,
    names: Sequence[str] = (),
    *,
    slice_days: int = 1,
    parallel: int = 1,
    say: Say = lambda *_: None,
) -> Iterator[Slice]:
    """Make the window [start, end), whole UTC days, of the tables (default: all) again, each table after its inputs.

    parallel: how many slices are made at the same time, each in a process of its own.

    Raises:
        UsageError: no such table, no whole days. Terminal: raw no longer holds the records of rows that are there.
    """
    if start >= end or any(t.time() != datetime.min.time() for t in (start, end)):
        raise UsageError("a backfill is of whole UTC days: --from before --to, both at midnight")
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    if unknown := [name for name in names if lake.declaration(name) and name not in transforms]:
        raise UsageError(f"{unknown[0]} has no transform: writers fill it (lakehouse ingest)")
    say("catching up", 0, 0)
    # what is behind would be made from less than its inputs hold
    run(lake, with_inputs(names or transforms, lake.declarations, transforms))
    chosen = [name for name in transforms if name in (names or transforms)]
    starts = range(0, (end - start).days, slice_days)
    days = [(start + timedelta(days=n), min(end, start + timedelta(days=n + slice_days))) for n in starts]
    journal = _Journal(lake.settings.home, (start, end, slice_days, chosen, lake.run.code_version))
    # a table that is replaced whole is so once
    slices = {name: [(start, end)] if lake.declaration(name).build.mode == "replace" else days for name in chosen}
    total, done = sum(map(len, slices.values())), 0
    for name in chosen:
        if hasattr(transforms[name].module, "derive"):
            found = _derived(lake, name, days, journal, parallel)
        else:
            found = _taken_up(lake, name, slices[name], transforms)
        for made in found:
            done += 1
            say(f"{name} {made.start:%Y-%m-%d}", done, total)
            yield made
    journal.close()


def _derived(
    lake: Lake, name: str, days: Sequence[tuple[datetime, datetime]], journal: _Journal, parallel: int
) -> Iterator[Slice]:
    open_ = []
    for start, end in days:
        known = journal.done(name, start)
        if known is not None and still_holds(lake, known):
            yield known
        else:
            open_.append((start, end))
    if parallel == 1:
        made = (derive_slice(lake, name, start, end) for start, end in open_)
        yield from map(journal.note, made)
        return
    with ProcessPoolExecutor(parallel, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(_in_process, lake.settings, lake.run, name, start, end) for start, end in open_]
        try:
            yield from (journal.note(slice_.result()) for slice_ in waiting)
        finally:
            pool.shutdown(cancel_futures=True)


def _in_process(settings: Settings, run: Run, name: str, start: datetime, end: datetime) -> Slice:
    return derive_slice(open_lake(settings, run), name, start, end)


def derive_slice(lake: Lake, name: str, start: datetime, end: datetime) -> Slice:
    """Make the rows of [start, end) again, and replace those of the table if they differ."""
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    return planned_again(lambda: _derive_once(lake, name, transforms, start, end))


def _derive_once(lake: Lake, name: str, transforms: dict[str, Transform], start: datetime, end: datetime) -> Slice:
    declared, transform = lake.declaration(name), transforms[name]
    _, pinned = consistent_cut(lake, upstream(declared, transform), transforms)
    table = lake.open_for_write(name)
    current = table.current_snapshot()
    reached = vector_of(table.metadata, name)
    assert transform.module is not None
    by = transform.module.WINDOW
    with connect(lake.settings) as connection:
        base = current.snapshot_id if current else None
        plan = Plan(lake, declared, transform, table, base, reached, reached, pinned, connection, caught_up=True)
        rows = transform.module.derive(plan, start, end)
        connection.register("__derived", rows)
        files = live_files(plan, all_of((at_least(by, start), below(by, end))))
        held = files_sql(table, files) if files else empty_sql(table)
        columns, within = ", ".join(quote(c) for c in declared.column_names), _within(by, start, end)
        connection.execute(f"CREATE TEMP TABLE __held AS SELECT {columns} FROM {held} WHERE {within}")
        wanted = content_of(connection, "__derived", declared.column_names)
        inputs = plan.snapshots()
        made = Slice(name, start, end, wanted.rows, wanted.hash, inputs=inputs)
        if wanted == content_of(connection, "__held", declared.column_names):
            return made
        _refuse_lost(plan)
        kept = fetch(connection, f"SELECT {columns} FROM {held} WHERE NOT ({within})")
        add = stage_with(plan, rows, kept)
        check_staged(connection, declared, add)
        differ = f"(SELECT {columns} FROM __derived EXCEPT ALL SELECT {columns} FROM __held)"
        gone = f"(SELECT {columns} FROM __held EXCEPT ALL SELECT {columns} FROM __derived)"
        changed = max(count_rows(connection, differ), count_rows(connection, gone))
    note = {"kind": "backfill", "from": start.isoformat(), "to": end.isoformat()}
    change = Change(
        consumer=name,
        expected=reached,
        reached=reached,
        add=add,
        remove=files,
        rewrite=True,
        base=base,
        scope=scope_of([*add, *files]),
        inputs=inputs,
        note=note,
    )
    done = commit(table, lake.run, change)
    return msgspec.structs.replace(made, changed=changed, snapshot_id=done.snapshot_id)


def _within(column: str, start: datetime, end: datetime) -> str:
    return f"{quote(column)} >= '{start.isoformat()}' AND {quote(column)} < '{end.isoformat()}'"


def _refuse_lost(plan: Plan) -> None:
    """A row may only go or change if its record is still in raw: what retention has dropped cannot be made again."""
    source = plan.declared.build.driver
    assert source is not None
    gone = fetch(
        plan.connection,
        'SELECT DISTINCT topic, partition, "offset" FROM __held ANTI JOIN __derived USING (topic, partition, "offset")',
    )
    if gone.num_rows == 0:
        return
    table, snapshot = plan.pinned[source]
    there = count_rows(plan.connection, coordinates_sql(plan.connection, table, snapshot, gone))
    if there < gone.num_rows:
        raise Terminal(
            f"{plan.declared.table}: {gone.num_rows - there:,} rows of the window come from records that {source} no longer "
            "holds. They cannot be made again and were left as they are; choose a later --from"
        )


def still_holds(lake: Lake, made: Slice) -> bool:
    """Whether the table holds in the slice what it held when that was made, and its inputs are the same."""
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    declared, transform = lake.declaration(made.table), transforms[made.table]
    _, pinned = consistent_cut(lake, upstream(declared, transform), transforms)
    if any(made.inputs.get(name) != snapshot for name, (_, snapshot) in pinned.items() if not name.startswith("raw.")):
        return False
    table = lake.load(made.table)
    assert transform.module is not None
    by = transform.module.WINDOW
    files = files_where(table, all_of((at_least(by, made.start), below(by, made.end))))
    with connect(lake.settings) as connection:
        relation = f"{files_sql(table, files) if files else empty_sql(table)} WHERE {_within(by, made.start, made.end)}"
        return content_of(connection, relation, declared.column_names).hash == made.hash


def _taken_up(
    lake: Lake, name: str, days: Sequence[tuple[datetime, datetime]], transforms: dict[str, Transform]
) -> Iterator[Slice]:
    """Let a table work once more on the records that were received in the window."""
    for start, end in days:
        records = [_received(lake, raw, start, end) for raw in sorted(raw_roots(lake, name, transforms))]
        report, _ = take_up_again(lake, name, pa.concat_tables(records), transforms)
        yield Slice(name, start, end, changed=report.rows, snapshot_id=report.snapshot_id)


def _received(lake: Lake, raw: str, start: datetime, end: datetime) -> pa.Table:
    """Coordinates of the records of a raw table that were received in [start, end)."""
    where = all_of((at_least("received_at", start), below("received_at", end)))
    return lake.load(raw).scan(where, selected_fields=tuple(COORDINATES)).to_arrow().select(COORDINATES)


class _Journal:
    """The derived slices that an unfinished backfill has done: one JSON file, named after what the backfill is of."""

    def __init__(self, home: Path, key: object) -> None:
        name = hashlib.sha256(msgspec.json.encode(key)).hexdigest()[:16]
        self._path = home / "backfills" / f"{name}.json"
        self._slices = msgspec.json.decode(self._path.read_bytes(), type=list[Slice]) if self._path.is_file() else []

    def done(self, table: str, start: datetime) -> Slice | None:
        """The slice as it was made, if it was."""
        return next((s for s in self._slices if (s.table, s.start) == (table, start)), None)

    def note(self, made: Slice) -> Slice:
        """Write down that a slice is done; returns it."""
        self._slices = [s for s in self._slices if (s.table, s.start) != (made.table, made.start)] + [made]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".new")
        scratch.write_bytes(msgspec.json.encode(self._slices))
        scratch.replace(self._path)
        return made

    def close(self) -> None:
        """Forget it: the backfill is through."""
        self._path.unlink(missing_ok=True)
