"""Building a history: of a touched key only the intervals that change are replaced (lakehouse/scd2.py says which)."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pyarrow as pa
from pyiceberg.expressions import AlwaysTrue, Not
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.manifest import DataFile

from lakehouse.builds.touched import bind_touched, touched_keys
from lakehouse.plans import Plan, Staged, count_rows, live_files, other_rows, stage_with
from lakehouse.predicates import is_null
from lakehouse.queries import files_sql, path_for_duckdb
from lakehouse.scd2 import scd2_update


def history(plan: Plan) -> Staged:
    """Of the touched keys replace the intervals that change: of most only the open one, of a late one those it splits."""
    module, by = plan.transform.module, list(plan.declared.build.by)
    assert module
    new, new_rows, slices = touched_keys(plan)
    add: list[DataFile] = []
    remove: list[DataFile] = []
    count = 0
    for keys in slices:
        connection = plan.connection
        connection.register("__keys", keys)
        continued = bind_touched(plan, keys, new)
        begins = states = module.states(plan.inputs())
        if continued:
            first = pl.DataFrame(connection.execute("SELECT * FROM __first").to_arrow_table())
            begins = states.join(first, on=by).filter(pl.col(module.SCD2["time"]) >= pl.col("first")).drop("first")
        held = _held_intervals(plan, by, continued)
        change = scd2_update(held.drop("filename"), states, begins, **module.SCD2)
        remove, kept = _without(plan, change.remove.join(held, on=change.remove.columns, nulls_equal=True))
        add += stage_with(plan, change.add.to_arrow(), kept)
        count += change.add.height
    return Staged(add, remove, new_input_rows=new_rows, rows=count)


def _without(plan: Plan, gone: pl.DataFrame) -> tuple[list[DataFile], pa.Table | None]:
    """The live files that hold the rows `gone` (with their `filename`), and the other rows of these files."""
    if gone.is_empty():
        return [], None
    by_path = {path_for_duckdb(f.file_path): f for f in live_files(plan, AlwaysTrue())}
    remove = [by_path[path] for path in sorted(set(gone["filename"]))]
    plan.connection.register("__gone", gone.select(plan.declared.primary_key).to_arrow())
    return remove, other_rows(plan, remove, "__gone", ", ".join(f'"{c}"' for c in plan.declared.primary_key))


def _held_intervals(plan: Plan, by: Sequence[str], continued: bool) -> pl.DataFrame:
    """The table's intervals of the touched keys, with `filename`: of keys that are not late only the open ones."""
    columns = ", ".join(f'"{c}"' for c in plan.declared.column_names)
    using = ", ".join(f'"{c}"' for c in by)
    parts = []
    open_files = live_files(plan, is_null("valid_to"))
    if open_files:
        held = files_sql(plan.table, (f.file_path for f in open_files))
        parts.append(f"SELECT {columns}, filename FROM {held} SEMI JOIN __keys USING ({using}) WHERE valid_to IS NULL")
    late = "__late" if continued else "__keys"
    count = count_rows(plan.connection, late)
    closed = live_files(plan, Not(is_null("valid_to"))) if count else []
    if closed:
        held = files_sql(plan.table, (f.file_path for f in closed))
        parts.append(f"SELECT {columns}, filename FROM {held} SEMI JOIN {late} USING ({using}) WHERE valid_to IS NOT NULL")
    if not parts:
        schema = schema_to_pyarrow(plan.table.schema(), include_field_ids=False)
        return pl.DataFrame(schema.empty_table()).with_columns(pl.lit(None, pl.String).alias("filename"))
    return pl.DataFrame(plan.connection.execute(" UNION ALL ".join(parts)).to_arrow_table())
