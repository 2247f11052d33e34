"""Tags: a snapshot that must survive expiry (an auditor's, the input of a report) is given a name."""

from __future__ import annotations

import re

from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.refs import SnapshotRefType
from pyiceberg.table.update import RemoveSnapshotRefUpdate, SetSnapshotRefUpdate

from lakehouse.commit import Change, commit
from lakehouse.errors import UsageError
from lakehouse.lake import Lake


def tag_snapshot(lake: Lake, name: str, tag: str, snapshot_id: int | None = None) -> int:
    """Name a snapshot (default: the current one) of a table; expiry keeps it and its files until the tag is removed.

    The commit moves `main` by an empty snapshot: it says who pinned what, and excludes an expiry of that snapshot under way.

    Returns:
        The snapshot id. Again is harmless.

    Raises:
        UsageError: there is no such snapshot, or another one has the name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", tag) or tag == "main":
        raise UsageError(f"tag {tag!r}: a tag is letters, digits, dots, dashes and underscores, and not `main`")
    table = lake.load(name)
    current = table.current_snapshot()
    chosen = snapshot_id if snapshot_id is not None else current.snapshot_id if current else None
    if chosen is None:
        raise UsageError(f"{name} holds nothing yet: there is no snapshot to tag")
    ref = table.metadata.refs.get(tag)
    if ref is not None and ref.snapshot_id == chosen:
        return chosen

    def refuse(metadata: TableMetadata) -> None:
        if metadata.snapshot_by_id(chosen) is None:
            raise UsageError(f"{name} has no snapshot {chosen}; see: lakehouse show {name}")
        if tag in metadata.refs:
            raise UsageError(f"{name}: {tag} names snapshot {metadata.refs[tag].snapshot_id}; remove it first, or choose another")

    pin = SetSnapshotRefUpdate(ref_name=tag, type=SnapshotRefType.TAG, snapshot_id=chosen)  # type: ignore[call-arg]
    note = {"kind": "tag", "tag": tag, "tagged": str(chosen)}
    commit(table, lake.run, Change(name, {}, {}, updates=[pin], refuse=refuse, note=note))
    return chosen


def remove_tag(lake: Lake, name: str, tag: str) -> None:
    """Remove a tag; its snapshot expires as any other.

    Raises:
        UsageError: there is no such tag.
    """
    table = lake.load(name)

    def refuse(metadata: TableMetadata) -> None:
        if tag not in metadata.refs or metadata.refs[tag].snapshot_ref_type != "tag":
            known = ", ".join(sorted(n for n, r in metadata.refs.items() if r.snapshot_ref_type == "tag"))
            raise UsageError(f"{name} has no tag {tag!r}; it has: {known or 'none'}")

    unpin = RemoveSnapshotRefUpdate(ref_name=tag)  # type: ignore[call-arg]
    commit(table, lake.run, Change(name, {}, {}, updates=[unpin], refuse=refuse, note={"kind": "untag", "tag": tag}))
