"""Heads: one row an object with the state that its versions add up to, so that what comes after them needs none of them.

A batch names objects. Of nearly all, everything new is later than everything known: their head and the new rows say all there is
to know, and no older version is read. Only an object with something late, or something that may be known already, is looked up.
The result is the same; the cost grows with the batch. See docs/decisions, "Heads".
"""

from __future__ import annotations

import pyarrow as pa
from pyiceberg.table import Table

from lakehouse.keyed import among_sql, files_with
from lakehouse.lake import history, snapshot_vector
from lakehouse.plans import Plan
from lakehouse.positions import vector_of
from lakehouse.queries import empty_sql, fetch

REDATED = "redated"
"""In the summary of a snapshot: a row has made way for a copy of a later time. Who takes it up cannot go on from heads."""


def heads_sql(plan: Plan, objects: pa.ChunkedArray) -> str | None:
    """The heads of `objects` as they were at the positions that the plan starts from, as an SQL table expression.

    None if there is no such snapshot (the table of heads is at other positions, or its snapshot has expired), or if what it says
    does not hold any more: then all versions have to be read, which gives the same.
    """
    build = plan.declared.build
    if build.heads is None or not any(plan.expected.values()) or _redated(plan):
        return None
    table = plan.lake.find(build.heads)
    snapshot = _snapshot_at(plan, table) if table else None
    if table is None or snapshot is None:
        return None
    column = plan.lake.declaration(build.heads).partition[0].column
    files = files_with(table, column, objects, snapshot)
    if not files:
        return empty_sql(table)
    columns = ", ".join(f'"{f.name}"' for f in table.schema().fields)
    return f"(SELECT {columns} FROM {among_sql(table, files, column, objects)})"


def _redated(plan: Plan) -> bool:
    """Whether a row of the driver that the positions had passed has made way for one of a later time (REDATED) since.

    Then what a head adds up to has lost a part that no new row tells of. True also if it cannot be known, for the snapshots
    since have expired.
    """
    driver = plan.declared.build.driver
    assert driver
    table, pinned = plan.pinned[driver]
    snapshot = table.snapshot_by_id(pinned) if pinned is not None else None
    while snapshot is not None:
        reached = snapshot_vector(snapshot, driver)  # empty: another tool made it
        if reached and all(offset <= plan.expected.get(key, 0) for key, offset in reached.items()):
            return False
        if snapshot.summary and f"lakehouse.{REDATED}" in snapshot.summary.additional_properties:
            return True
        snapshot = table.snapshot_by_id(snapshot.parent_snapshot_id) if snapshot.parent_snapshot_id is not None else None
    return True


def _snapshot_at(plan: Plan, table: Table) -> int | None:
    name = plan.declared.build.heads
    assert name
    wanted = {k: v for k, v in plan.expected.items() if v}
    current = table.current_snapshot()
    if current is not None and {k: v for k, v in vector_of(table.metadata, name).items() if v} == wanted:
        return current.snapshot_id
    for snapshot in history(table):
        if {k: v for k, v in snapshot_vector(snapshot, name).items() if v} == wanted:
            return snapshot.snapshot_id
    return None


def split_keys(plan: Plan, new: str) -> str | None:
    """Make `__heads`, `__first` and `__late` for the touched keys (`__keys`); None if there are no heads to go on from.

    new: the new rows of the driver, as an SQL table expression. `__first`: when the first of them began, by key. `__late`: the
    keys that have a new row which is not later than their head.

    Returns:
        An SQL condition on a row `i` of the driver: it belongs to one of the keys that are not late.
    """
    build, connection = plan.declared.build, plan.connection
    on = " AND ".join(f'i."{source}" = k."{key}"' for key, source in build.by.items())
    keys = ", ".join(f'k."{key}"' for key in build.by)
    where = build.where or "true"
    connection.execute(
        f'CREATE OR REPLACE TEMP TABLE __first AS SELECT {keys}, min(i."{build.time}") AS first '
        f"FROM (FROM {new} WHERE {where}) AS i JOIN __keys AS k ON {on} GROUP BY ALL"
    )
    column = plan.lake.declaration(build.heads).partition[0].column if build.heads else ""
    matched = next((key for key, source in build.by.items() if source == column), None)
    if matched is None:
        return None
    objects = fetch(connection, f'SELECT DISTINCT "{matched}" FROM __keys').column(0)
    heads = heads_sql(plan, objects)
    if heads is None:
        return None
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE __heads AS SELECT i.* FROM (FROM {heads} WHERE {where}) AS i JOIN __keys AS k ON {on}"
    )
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE __late AS SELECT {keys} FROM __first AS k JOIN __heads AS i ON {on} "
        f'WHERE k.first <= i."{build.time}"'
    )
    using = " AND ".join(f'i."{source}" = l."{key}"' for key, source in build.by.items())
    return f"NOT EXISTS (SELECT 1 FROM __late AS l WHERE {using})"


def heads_as_versions(columns: list[tuple[str, str]], present: pa.Schema, not_late: str) -> str:
    """SELECT of `__heads` (of keys that are not late) as rows of the driver: what a head does not say is NULL."""
    chosen = ", ".join(f'i."{c}"' if c in present.names else f'CAST(NULL AS {kind}) AS "{c}"' for c, kind in columns)
    return f"SELECT {chosen} FROM __heads AS i WHERE {not_late}"
