"""Reproduce: make a snapshot of a table again from the inputs that it records, and compare.

A rehearsal is a lake of its own: the same job runs in it, from nothing, on the inputs by time travel and up to the positions
recorded, and commits to a scratch table. The table that is reproduced is never read, so it may be gone: what is needed of it
is in its `Record`, which can be kept elsewhere.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import polars as pl
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot

from lakehouse.commit import Change, commit
from lakehouse.content import Content, content_at
from lakehouse.dead_letters import TABLE as LETTERS
from lakehouse.errors import UsageError
from lakehouse.lake import Lake, snapshot_at, snapshot_inputs, snapshot_vector
from lakehouse.plans import Pinned
from lakehouse.positions import dump_vector, load_vector
from lakehouse.predicates import equal
from lakehouse.queries import connect
from lakehouse.runner import advance
from lakehouse.staging import stage
from lakehouse.transforms import Transform, load_transforms, upstream


class Record(msgspec.Struct, frozen=True):
    """What a snapshot says of itself. positions: {"topic/partition": next offset}; inputs: {table: snapshot id}.

    rows, hash: its content (lakehouse/content.py). code_version: of the code that made it.
    """

    table: str
    snapshot_id: int
    positions: dict[str, int]
    inputs: dict[str, int]
    code_version: str
    rows: int
    hash: str


class Reproduced(msgspec.Struct, frozen=True):
    """What was made again from a record, by this code."""

    record: Record
    rows: int
    hash: str
    code_version: str
    seconds: float

    @property
    def same(self) -> bool:
        """Whether it holds the same rows."""
        return (self.rows, self.hash) == (self.record.rows, self.record.hash)


@dataclass(frozen=True)
class Rehearsal(Lake):
    """A lake of scratch tables that sees of the real one the inputs of one table, and nothing else that is made from them."""

    real: Lake
    inputs: frozenset[str]

    def find(self, name: str) -> Table | None:
        """An input: the real table. Anything else: the scratch table, if there is one."""
        return self.real.find(name) if name in self.inputs or name.startswith("raw.") else super().find(name)

    def exists(self, name: str) -> bool:
        """Whether `find` finds it."""
        return self.find(name) is not None


def record_of(lake: Lake, name: str, snapshot_id: int | None = None) -> Record:
    """What a snapshot of a table (default: the current one) records of itself, and its content.

    A snapshot of maintenance has the rows of the one before it, and so its inputs.

    Raises:
        UsageError: no such snapshot, or the one that made its rows has expired.
    """
    table = lake.load(name)
    chosen = snapshot_at(table, name, snapshot_id) if snapshot_id is not None else table.current_snapshot()
    if chosen is None:
        raise UsageError(f"{name} holds nothing yet: there is no snapshot to look at")
    with connect(lake.settings) as connection:
        content = content_at(connection, table, chosen.snapshot_id)
    made = _made_by(table, chosen)
    inputs = snapshot_inputs(made) if made else {}
    code = str(made.summary.additional_properties.get("lakehouse.code-version", "")) if made and made.summary else ""
    positions = dump_vector(snapshot_vector(made or chosen, name))
    return Record(name, chosen.snapshot_id, positions, inputs, code, content.rows, content.hash)


def _made_by(table: Table, snapshot: Snapshot | None) -> Snapshot | None:
    """The nearest snapshot, from this one back, that names its inputs; None if it has expired or there are none (raw)."""
    while snapshot is not None and not snapshot_inputs(snapshot):
        parent = snapshot.parent_snapshot_id
        snapshot = table.snapshot_by_id(parent) if parent is not None else None
    return snapshot


def reproduce(lake: Lake, record: Record, say: Callable[[str, int, int], None] = lambda *_: None) -> Reproduced:
    """Make the rows of a record again, from its inputs, without its table.

    Raises:
        UsageError: it is a raw table; or an input's snapshot has expired (a raw table is read by offsets, and needs none).
    """
    started = time.monotonic()
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    if record.table not in transforms:
        raise UsageError(f"{record.table} is what was received: it is made from nothing that it could be made from again")
    transform = transforms[record.table]
    declared = lake.declaration(record.table)
    sources = upstream(declared, transform)
    pinned = _pinned(lake, record, sources)
    cut = load_vector(record.positions)
    with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=_scratch(lake)) as folder:
        own = {"home": Path(folder), "catalog_uri": f"sqlite:///{folder}/catalog.db", "warehouse": f"{folder}/warehouse"}
        rehearsal = Rehearsal(lake.settings.model_copy(update=own), lake.declarations, lake.run, lake, frozenset(sources))
        _copy_letters(rehearsal, record.table)
        made = _run(rehearsal, record.table, transform, cut, pinned, say)
    return Reproduced(record, made.rows, made.hash, lake.run.code_version, round(time.monotonic() - started, 3))


def _scratch(lake: Lake) -> Path:
    place = lake.settings.home / "tmp"
    place.mkdir(parents=True, exist_ok=True)
    return place


def _run(
    rehearsal: Rehearsal,
    name: str,
    transform: Transform,
    cut: Mapping[tuple[str, int], int],
    pinned: Pinned,
    say: Callable[[str, int, int], None],
) -> Content:
    total, caught_up = sum(cut.values()), False
    while not caught_up:
        report, _ = advance(rehearsal, name, transform, cut, pinned)
        caught_up = report.caught_up
        say(f"making {name} again", sum(rehearsal.vector(name).values()), total)
    table = rehearsal.load(name)
    current = table.current_snapshot()
    with connect(rehearsal.settings) as connection:
        return content_at(connection, table, current.snapshot_id if current else None)


def _pinned(lake: Lake, record: Record, sources: tuple[str, ...]) -> dict[str, tuple[Table, int | None]]:
    found: dict[str, tuple[Table, int | None]] = {}
    for source in sources:
        table, snapshot = lake.load(source), record.inputs.get(source)
        if snapshot is not None and table.snapshot_by_id(snapshot) is None:
            current = table.current_snapshot()
            if not source.startswith("raw.") or current is None:
                raise UsageError(
                    f"{record.table}: its input {source} no longer keeps snapshot {snapshot}. Pin what must stay reproducible "
                    f"while it is there: lakehouse tag {source} NAME --snapshot {snapshot}"
                )
            snapshot = current.snapshot_id  # rows of raw are found by their offsets, and never change
        found[source] = (table, snapshot)
    return found


def _copy_letters(rehearsal: Rehearsal, consumer: str) -> None:
    """Dead letters that are known stay so: when a replay took up a record decides from when on it is known."""
    table = rehearsal.real.find(LETTERS)
    if table is None:
        return
    letters = pl.DataFrame(table.scan(equal("consumer", consumer)).to_arrow())
    if letters.is_empty():
        return
    scratch = rehearsal.open_for_write(LETTERS)
    files = stage(scratch, rehearsal.declaration(LETTERS), letters.to_arrow())
    commit(scratch, rehearsal.run, Change(LETTERS, {}, {}, add=files))
