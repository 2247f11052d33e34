"""Building a history: of a touched key only the intervals that change are replaced (lakehouse/scd2.py says which)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import polars as pl
from pyiceberg.expressions import BooleanExpression, Not
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.manifest import DataFile

from lakehouse.builds.touched import bind_touched, touched_keys
from lakehouse.deletes import take_out
from lakehouse.keyed import among_sql
from lakehouse.plans import Gathered, Plan, Staged, frame, live_files
from lakehouse.predicates import at_least, is_null
from lakehouse.queries import POSITION, fetch, quote
from lakehouse.scd2 import scd2_update


def history(plan: Plan) -> Staged:
    """Of the touched keys replace the intervals that change: of most only the open one, of a late one those it splits."""
    module, by = plan.transform.module, list(plan.declared.build.by)
    assert module
    new, new_rows, slices = touched_keys(plan)
    add, count = Gathered(plan), 0
    deletes: list[DataFile] = []
    remove: Sequence[DataFile] = []
    for keys in slices:
        connection = plan.connection
        connection.register("__keys", keys)
        continued = bind_touched(plan, keys, new)
        begins = states = module.states(plan.inputs())
        if continued:
            first = frame(connection, "SELECT * FROM __first")
            begins = states.join(first, on=by).filter(pl.col(module.SCD2["time"]) >= pl.col("first")).drop("first")
        held = _held_intervals(plan, by, continued)
        change = scd2_update(held.drop("filename", POSITION), states, begins, **module.SCD2)
        deletes, remove, kept = take_out(plan, change.remove.join(held, on=change.remove.columns, nulls_equal=True))
        add.put(kept, change.add.to_arrow())
        count += change.add.height
    return Staged([*add.files(), *deletes], remove, new_input_rows=new_rows, rows=count)


def _held_intervals(plan: Plan, by: Sequence[str], continued: bool) -> pl.DataFrame:
    """The table's intervals of the touched keys, with where they are: of keys that are not late only the open ones."""
    open_, closed = "valid_to IS NULL", "valid_to IS NOT NULL"
    parts = [_held(plan, by, "__keys", is_null("valid_to"), open_)]
    if not continued:
        parts.append(_held(plan, by, "__keys", Not(is_null("valid_to")), closed))
    elif first := _first_of_late(plan, by):
        # what a new version can change ends with a later version of its key, or is open: see scd2_update
        parts.append(_held(plan, by, "__late", at_least("valid_to", first), closed))
    return pl.concat(parts, how="vertical_relaxed")


def _first_of_late(plan: Plan, by: Sequence[str]) -> datetime | None:
    """When the first of the new versions of the late keys began; None if no key is late."""
    using = ", ".join(quote(c) for c in by)
    found = plan.connection.execute(f"SELECT min(first) FROM __first SEMI JOIN __late USING ({using})").fetchall()
    return found[0][0]  # type: ignore[no-any-return]


def _held(plan: Plan, by: Sequence[str], keys: str, files_of: BooleanExpression, where: str) -> pl.DataFrame:
    """The intervals of the keys (a relation) of which `where` is true; `files_of` says which files have any.

    With `filename` and `file_row_number`.
    """
    files = live_files(plan, files_of)
    if not files:
        schema = schema_to_pyarrow(plan.table.schema(), include_field_ids=False)
        nowhere = {"filename": pl.lit(None, pl.String), POSITION: pl.lit(None, pl.Int64)}
        return pl.DataFrame(schema.empty_table()).with_columns(**nowhere)
    last = by[-1]  # the id; those before it say whose it is
    ids = fetch(plan.connection, f"SELECT DISTINCT {quote(last)} FROM {keys}").column(0)
    columns, using = (", ".join(quote(c) for c in names) for names in (plan.declared.column_names, by))
    held = among_sql(plan.table, files, last, ids, numbered=True)
    found = f"SELECT {columns}, filename, {POSITION} FROM {held} SEMI JOIN {keys} USING ({using}) WHERE {where}"
    return frame(plan.connection, found)
