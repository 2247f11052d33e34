"""Building by merge: the rows of a touched key are what the transform makes of all versions of that key."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pyarrow as pa
from pyiceberg.manifest import DataFile

from lakehouse.builds.touched import bind_touched, touched_keys
from lakehouse.deletes import take_out
from lakehouse.keyed import among_sql, files_with
from lakehouse.plans import Gathered, Plan, Staged, frame
from lakehouse.queries import POSITION, quote


def merge(plan: Plan) -> Staged:
    """Replace all rows of the touched keys by what the transform makes of all versions of these keys."""
    new, new_rows, slices = touched_keys(plan)
    add, count = Gathered(plan), 0
    deletes: list[DataFile] = []
    remove: Sequence[DataFile] = []
    for keys in slices:
        plan.connection.register("__keys", keys)
        bind_touched(plan, keys, new)
        rows = plan.transform.build(plan.inputs()).rows
        deletes, remove, kept = take_out(plan, _held(plan, keys))
        add.put(kept, rows)
        count += rows.num_rows
    return Staged([*add.files(), *deletes], remove, new_input_rows=new_rows, rows=count)


def _held(plan: Plan, keys: pa.Table) -> pl.DataFrame:
    """The primary keys of the table's rows of the touched keys (the relation `__keys`), with where they are."""
    part = plan.declared.partition[0].column
    files = files_with(plan.table, part, keys.column(part), plan.base)
    if not files:
        return pl.DataFrame()
    using, chosen = (", ".join(quote(c) for c in names) for names in (plan.declared.build.by, plan.declared.primary_key))
    held = among_sql(plan.table, files, part, keys.column(part), numbered=True)
    return frame(plan.connection, f"SELECT {chosen}, filename, {POSITION} FROM {held} SEMI JOIN __keys USING ({using})")
