"""Building by merge: the rows of a touched key are what the transform makes of all versions of that key."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from pyiceberg.manifest import DataFile

from lakehouse.builds.touched import bind_touched, touched_keys
from lakehouse.keyed import files_with
from lakehouse.plans import Gathered, Plan, Staged, other_rows
from lakehouse.queries import fetch, files_sql, path_for_duckdb


def merge(plan: Plan) -> Staged:
    """Replace all rows of the touched keys by what the transform makes of all versions of these keys."""
    new, new_rows, slices = touched_keys(plan)
    add, count = Gathered(plan), 0
    remove: Sequence[DataFile] = []
    for keys in slices:
        plan.connection.register("__keys", keys)
        bind_touched(plan, keys, new)
        rows = plan.transform.build(plan.inputs()).rows
        remove, kept = touched_files(plan, "__keys", list(plan.declared.build.by))
        add.put(kept, rows)
        count += rows.num_rows
    return Staged(add.files(), remove, new_input_rows=new_rows, rows=count)


def touched_files(plan: Plan, keys: str, key_columns: Sequence[str]) -> tuple[Sequence[DataFile], pa.Table | None]:
    """The live files that hold any of the keys (a relation), and their rows of other keys, which a rewrite must keep."""
    part = plan.declared.partition[0].column
    values = fetch(plan.connection, f'SELECT DISTINCT "{part}" FROM {keys}').column(0)
    candidates = files_with(plan.table, part, values, plan.base)
    if not candidates:
        return [], None
    using = ", ".join(f'"{c}"' for c in key_columns)
    by_path = {path_for_duckdb(f.file_path): f for f in candidates}
    held = files_sql(plan.table, candidates)
    hit = plan.connection.execute(f"SELECT DISTINCT filename FROM {held} SEMI JOIN {keys} USING ({using})").fetchall()
    remove = [by_path[path] for (path,) in sorted(hit)]
    if not remove:
        return [], None
    return remove, other_rows(plan, remove, keys, using)
