"""Rollback: a table goes back to a snapshot together with the positions it had then, in one commit."""

from __future__ import annotations

import json

from pyiceberg.table.refs import MAIN_BRANCH
from pyiceberg.table.update import AssertTableUUID

from lakehouse.errors import UsageError
from lakehouse.lake import Lake, history
from lakehouse.positions import PROPERTY_PREFIX, load_vector, position_properties, read_positions


def rollback_table(lake: Lake, name: str, snapshot_id: int) -> dict[str, dict[str, int]]:
    """Set `main` back to a snapshot of its own history and every consumer's positions to that snapshot's vector.

    Returns:
        The positions restored: {consumer: {"topic/partition": offset}}. Downstream tables are not touched.

    Raises:
        UsageError: the snapshot is not in the table's history.
        CommitFailedException: another commit came in between; nothing was changed, run it again.
    """
    table = lake.load(name)
    target = next((s for s in history(table) if s.snapshot_id == snapshot_id), None)
    if target is None or target.summary is None:
        raise UsageError(f"{name}: snapshot {snapshot_id} is not in its history; see: lakehouse show {name}")
    vectors: dict[str, dict[str, int]] = json.loads(target.summary.additional_properties.get("lakehouse.positions", "{}"))
    sources = {topic: p.source for entries in read_positions(table.metadata).values() for (topic, _), p in entries.items()}
    restored: dict[str, str] = {}
    for consumer, dumped in vectors.items():
        restored |= position_properties(consumer, load_vector(dumped), target.sequence_number or 0, sources)
    stale = [p for p in table.properties if p.startswith(PROPERTY_PREFIX) and p not in restored]
    transaction = table.transaction()
    if stale:
        transaction.remove_properties(*stale)
    if restored:
        transaction.set_properties(restored)
    updates, requirements = transaction._set_ref_snapshot(snapshot_id, MAIN_BRANCH, "branch")
    table._do_commit(
        updates=(*transaction._updates, *updates), requirements=(*requirements, AssertTableUUID(uuid=table.metadata.table_uuid))
    )
    return vectors
