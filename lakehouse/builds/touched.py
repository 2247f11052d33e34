"""The keys that new driver rows touch, and the inputs restricted to them: what a merge and a history are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.transforms import BucketTransform
from pyiceberg.types import StringType

from lakehouse.coordinates import below_sql
from lakehouse.heads import heads_as_versions, split_keys
from lakehouse.keyed import holding_sql
from lakehouse.links import children
from lakehouse.live import files_where
from lakehouse.plans import Plan, count_rows, live_files
from lakehouse.queries import bind_sql, duckdb_type, empty_sql, fetch, files_sql, quote

SLICE_ROWS = 250_000
"""Driver rows that are taken up at once where a table is built whole: ten columns of text each, several times over in memory."""

SLICES = 16
"""The slices are as many times this as need be: a slice then lies in one bucket of a driver of so many."""

KEPT_KEYS = 2_000
"""Late keys whose versions are kept in memory for the next table; of more each table reads what it needs."""


def touched_keys(plan: Plan) -> tuple[str, int, list[pa.Table]]:
    """(the new rows of the driver as SQL, how many, the keys they touch): the keys in slices when a table is built whole.

    A slice has the keys of one bucket of the last key column, so that memory does not grow with what is read. Only where
    nothing is there yet: two slices could want to rewrite the same file.
    """
    build, connection = plan.declared.build, plan.connection
    assert build.driver
    new = plan.new_rows_sql(build.driver)
    pairs = ", ".join(f'"{source}" AS "{column}"' for column, source in build.by.items())
    keys = fetch(connection, f"SELECT DISTINCT {pairs} FROM {new} WHERE {build.where or 'true'}")
    new_rows = count_rows(connection, new)
    if keys.num_rows == 0 or new_rows <= SLICE_ROWS or live_files(plan, AlwaysTrue()):
        return new, new_rows, [keys] if keys.num_rows else []
    slices = SLICES * -(-new_rows // (SLICES * SLICE_ROWS))
    bucket = BucketTransform(slices).pyarrow_transform(StringType())(keys.column(list(build.by)[-1]))
    # those of one bucket of the driver one after the other
    in_order = sorted(range(slices), key=lambda i: (i % SLICES, i))
    return new, new_rows, [part for i in in_order if (part := keys.filter(pc.equal(bucket, i))).num_rows]


def bind_touched(plan: Plan, keys: pa.Table, new: str) -> bool:
    """Bind the inputs, restricted to the touched keys; the driver to heads and new rows where these suffice. Whether they did."""
    build = plan.declared.build
    goes_on = build.time and build.driver in plan.transform.inputs and plan.base is not None
    not_late = split_keys(plan, new) if goes_on else None
    for name in plan.transform.inputs:
        if name != build.driver or not_late is None:
            bind_sql(plan.connection, name, _restricted_sql(plan, name, keys))
            continue
        connection, table = plan.connection, plan.pinned[name][0]
        late = _restricted_sql(plan, name, fetch(connection, "SELECT * FROM __late"), late=True)
        columns = [(f.name, duckdb_type(f.field_type)) for f in table.schema().fields]
        present = fetch(connection, "SELECT * FROM __heads LIMIT 0").schema
        chosen = ", ".join(f'i."{c}"' for c, _ in columns)
        on = " AND ".join(f'i."{source}" = k."{key}"' for key, source in build.by.items())
        parts = [
            f"FROM {late}",
            heads_as_versions(columns, present, not_late),
            f"SELECT {chosen} FROM {new} AS i WHERE EXISTS (SELECT 1 FROM __keys AS k WHERE {on}) AND {not_late}",
        ]
        # not a table: a transform reads it once, and of its columns some
        bind_sql(connection, name, f"({' UNION ALL '.join(parts)})")
    return not_late is not None


@dataclass(frozen=True)
class _Kept:
    """The rows of a driver at a snapshot in which a column has one of the values."""

    snapshot: int | None
    column: str
    values: pa.Array
    rows: pa.Table

    def has(self, snapshot: int | None, column: str, values: pa.Array) -> bool:
        """Whether these rows hold all those."""
        return (self.snapshot, self.column) == (snapshot, column) and bool(pc.all(pc.is_in(values, self.values)).as_py())


def _read_once(plan: Plan, name: str, column: str, values: pa.ChunkedArray) -> str:
    """The rows of the driver in which the column has one of the values, as a relation of the connection.

    The tables of one driver are built one after the other, from the same snapshot, and each asks for the versions of the same
    late objects, which lie in as many row groups as there are objects: so the first reads them for all.
    """
    table, snapshot = plan.pinned[name]
    few, kept = pc.unique(values), plan.lake.kept.get(name)
    if not isinstance(kept, _Kept) or not kept.has(snapshot, column, few):
        plan.connection.register("__values", pa.table({column: few}))
        columns = ", ".join(quote(f.name) for f in table.schema().fields)
        rows = f"SELECT {columns} FROM {holding_sql(table, snapshot, column, values)} SEMI JOIN __values USING ({quote(column)})"
        kept = plan.lake.kept[name] = _Kept(snapshot, column, few, fetch(plan.connection, rows))
    plan.connection.register("__kept", kept.rows)
    return "__kept"


def _restricted_sql(plan: Plan, name: str, keys: pa.Table, *, late: bool = False) -> str:
    """An input restricted to the touched keys (the relation `__keys`), or to the late (`__late`), as an SQL table expression.

    keys: the same keys as the relation holds.
    """
    build = plan.declared.build
    table, snapshot = plan.pinned[name]
    columns = [f.name for f in table.schema().fields]
    # the driver and the heads of its objects are restricted by the columns matched on, any other input by the key columns it has
    matched = build.by if name in (build.driver, build.heads) else {c: c for c in build.by if c in columns}
    # of several columns the one that the table is partitioned by says most about where a row is
    parted = [p.column for p in plan.lake.declaration(name).partition]
    by = next((pair for pair in matched.items() if pair[1] in parted), next(reversed(matched.items()), None))
    if by is None:
        files = files_where(table, None, snapshot)
        rows = files_sql(table, files) if files else empty_sql(table)
    elif (linked := _linked(plan, name, keys)) is not None:
        rows = holding_sql(table, snapshot, *linked)
    elif late and 0 < keys.num_rows <= KEPT_KEYS:
        rows = _read_once(plan, name, by[1], keys.column(by[0]))
    else:
        rows = holding_sql(table, snapshot, by[1], keys.column(by[0]))
    chosen = ", ".join(f'i."{c}"' for c in columns)
    condition = " AND ".join(f'i."{source}" = k."{key}"' for key, source in matched.items()) or "true"
    if name == build.driver:
        condition += f" AND {below_sql(plan.reached)}"
    relation = "__late" if late else "__keys"
    return f"(SELECT {chosen} FROM {rows} AS i WHERE EXISTS (SELECT 1 FROM {relation} AS k WHERE {condition}))"


def _linked(plan: Plan, name: str, keys: pa.Table) -> tuple[str, pa.ChunkedArray] | None:
    """Where a table that lies by its own objects has the rows of the keys, which those are linked to: (its column, the objects).

    None if the keys themselves say where, or no link can be asked.
    """
    build, first = plan.declared.build, plan.lake.declaration(name).sort[:1]
    if build.links is None or not first or first[0] in build.by:
        return None
    *_, account, last = build.by
    found = children(plan, pl.DataFrame({"account": keys.column(account), "object_id": keys.column(last)}))
    return None if found is None else (first[0], found["object_id"].to_arrow())
