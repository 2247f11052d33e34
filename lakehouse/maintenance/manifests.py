"""Manifests: the small ones that commits leave become few large ones, ordered by partition, in a snapshot of the same files."""

from __future__ import annotations

from pyiceberg.table import Table, TableProperties

from lakehouse.commit import Change, commit
from lakehouse.lake import Run
from lakehouse.snapshots import undersized

MANY = 10
"""So many small manifests are worth a snapshot: planning reads each, and each commit copies the list of them."""


def small_manifests(table: Table) -> int:
    """How many manifests of the current snapshot are too small; 0 if they are too few to matter."""
    current = table.current_snapshot()
    if current is None:
        return 0
    name, default = TableProperties.MANIFEST_TARGET_SIZE_BYTES, TableProperties.MANIFEST_TARGET_SIZE_BYTES_DEFAULT
    found = len(undersized(current.manifests(table.io), int(table.properties.get(name, default))))
    return found if found >= MANY else 0


def rewrite_manifests(table: Table, run: Run) -> int:
    """Write the small manifests of a table anew if there are many; returns how many there were."""
    before = small_manifests(table)
    if before:
        name = ".".join(table.name())
        commit(table, run, Change(name, {}, {}, rewrite=True, scope=frozenset(), cluster=True, note={"kind": "manifests"}))
    return before
