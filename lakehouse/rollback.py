"""Rollback: a table goes back to a snapshot together with the positions it had then, in one commit."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from pyiceberg.table import Table
from pyiceberg.table.refs import MAIN_BRANCH
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.table.update import AssertTableUUID

from lakehouse.errors import UsageError
from lakehouse.lake import Lake, history
from lakehouse.positions import NUMBERED_HERE, PROPERTY_PREFIX, load_vector, position_properties, read_positions
from lakehouse.publish import Request, publish

ROLLBACKS = "lakehouse.rollbacks"
"""Table property: the last rollbacks, oldest first, each with an id of its own, run, code version, time (ms), from and to."""

REMEMBERED = 10


def rollback_table(lake: Lake, name: str, snapshot_id: int) -> dict[str, dict[str, int]]:
    """Set `main` back to a snapshot of its own history and every consumer's positions to that snapshot's vector.

    Returns:
        The positions restored: {consumer: {"topic/partition": offset}}. Downstream tables are not touched.

    A topic whose offsets the table itself gives out (NUMBERED_HERE) keeps its position: downstream has consumed those
    offsets, and other rows must not get them. If a commit comes in between, its rows go too, and so do the positions that it
    set: its writer reads them again.

    Raises:
        UsageError: the snapshot is not in the table's history, or its positions are not known any more, or the table has no
            positions at all: then nothing would bring back the rows that go.
        CommitUnresolved: the catalog stayed away; again is harmless. Terminal: it refuses.
    """
    table = lake.load(name)
    mark = uuid.uuid4().hex
    vectors: dict[str, dict[str, int]] = {}

    def build() -> Request:
        nonlocal vectors
        vectors, restored = _restored(name, table, snapshot_id)
        current = table.current_snapshot()
        done = {
            "id": mark,
            "run": lake.run.run_id,
            "code": lake.run.code_version,
            "at": int(time.time() * 1000),
            "from": current.snapshot_id if current else None,
            "to": snapshot_id,
        }
        restored[ROLLBACKS] = json.dumps([*rollbacks(table), done][-REMEMBERED:])
        stale = [p for p in table.properties if p.startswith(PROPERTY_PREFIX) and p not in restored]
        transaction = table.transaction()
        if stale:
            transaction.remove_properties(*stale)
        transaction.set_properties(restored)
        updates, requirements = transaction._set_ref_snapshot(snapshot_id, MAIN_BRANCH, "branch")
        return (*transaction._updates, *updates), (*requirements, AssertTableUUID(uuid=table.metadata.table_uuid))

    publish(table, build, lambda: any(r["id"] == mark for r in rollbacks(table)))
    return vectors


def rollbacks(table: Table) -> list[dict[str, Any]]:
    """What the table remembers of its last rollbacks, oldest first: see ROLLBACKS."""
    return list(json.loads(table.properties.get(ROLLBACKS, "[]")))


def _restored(name: str, table: Table, snapshot_id: int) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """The positions as of a snapshot of the table as it stands, and the properties that set them."""
    kept = history(table)
    place = next((i for i, s in enumerate(kept) if s.snapshot_id == snapshot_id), None)
    if place is None:
        raise UsageError(f"{name}: snapshot {snapshot_id} is not in its history; see: lakehouse show {name}")
    present = read_positions(table.metadata)
    vectors = _vectors_at(name, kept[place:])
    if not present:
        raise UsageError(f"{name} has no positions: nothing would write again what a rollback takes away")
    sources = {topic: p.source for entries in present.values() for (topic, _), p in entries.items()}
    restored: dict[str, str] = {}
    for consumer, dumped in vectors.items():
        for (topic, partition), position in present.get(consumer, {}).items():
            if position.source == NUMBERED_HERE:
                dumped[f"{topic}/{partition}"] = position.next_offset
        restored |= position_properties(consumer, load_vector(dumped), kept[place].sequence_number or 0, sources)
    return vectors, restored


def _vectors_at(name: str, kept: Sequence[Snapshot]) -> dict[str, dict[str, int]]:
    """The positions as of the first of `kept` (newest first): {consumer: {"topic/partition": offset}}.

    A snapshot made by another tool says nothing of positions, because it moved none: those before it still held.
    """
    for snapshot in kept:
        said = snapshot.summary.additional_properties.get("lakehouse.positions") if snapshot.summary else None
        if said is not None:
            return dict(json.loads(said))
    if kept[-1].sequence_number != 1:
        raise UsageError(
            f"{name}: the positions at snapshot {kept[0].snapshot_id} are not known: it was made by another tool, and those "
            f"before it have expired; choose another: lakehouse show {name}"
        )
    return {}
