"""What every writer does with a batch: stage it, check the staged files, append them at position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
from pyiceberg.table.update import TableUpdate

from lakehouse.checks import check_staged
from lakehouse.commit import Change, Committed, commit
from lakehouse.lake import Lake
from lakehouse.positions import Vector
from lakehouse.queries import connect
from lakehouse.staging import stage


def append_rows(
    lake: Lake,
    name: str,
    rows: pa.Table,
    expected: Vector,
    reached: Vector,
    sources: Mapping[str, str] | None = None,
    updates: Sequence[TableUpdate] = (),
) -> Committed:
    """Commit `rows` to a raw table together with the positions that its writer reached; again is refused, not repeated.

    expected: the positions the writer read when it began. sources: the origin of each topic (see `Position.source`).
    updates: see `Change`.

    Raises:
        Fenced, RolledBack, ChecksFailed, CommitUnresolved: see lakehouse.errors; nothing was published.
    """
    declared, table = lake.declaration(name), lake.open_for_write(name)
    files = stage(table, declared, rows)
    if files:
        with connect(lake.settings) as connection:
            check_staged(connection, declared, files)
    change = Change(name, expected, reached, add=files, sources=sources or {}, updates=updates)
    return commit(table, lake.run, change)
