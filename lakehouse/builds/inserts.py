"""Building by insertion: rows of new driver rows come in if their key is not there yet; of its copies the first counts."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pyarrow as pa
from pyiceberg.manifest import DataFile

from lakehouse.commit import scope_of
from lakehouse.copies import conflict_letters, first_copies
from lakehouse.dead_letters import understood
from lakehouse.heads import REDATED
from lakehouse.keyed import among_sql, files_with
from lakehouse.plans import Plan, Staged, count_rows, other_rows, stage_with
from lakehouse.queries import bind_sql, empty_sql, path_for_duckdb, quote
from lakehouse.staging import conform


def insert(plan: Plan) -> Staged:
    """Insert the rows whose primary key is not in the table yet; look only into the partitions the new rows fall in.

    The driver's rows carry `understood_at`: when a replay took up the record, NULL for one that never was a dead letter.
    """
    driver = plan.declared.build.driver
    assert driver
    connection = plan.connection
    connection.register("__understood", understood(plan.lake, plan.declared.table))
    new_rows = f'{plan.new_rows_sql(driver)} LEFT JOIN __understood USING (topic, partition, "offset")'
    bind_sql(connection, driver, f"(SELECT * FROM {new_rows})")
    plan.bind(n for n in plan.transform.inputs if n != driver)
    built = plan.transform.build(plan.inputs())
    rejected = plan.reject(built.rejected)
    rows = built.rows
    part = plan.declared.partition[0].column
    held = files_with(plan.table, part, rows.column(part), plan.base) if rows.num_rows else []
    remove: list[DataFile] = []
    kept = None
    note: dict[str, str] = {}
    copies = _with_copies(plan, rows, held)
    if copies.num_rows:
        key = ", ".join(f'"{c}"' for c in plan.declared.primary_key)
        connection.register("__rows", rows)
        connection.register("__copies", copies)
        fresh = connection.execute(f"SELECT * FROM __rows ANTI JOIN __copies USING ({key})").to_arrow_table()
        copies, remove, kept, note = _first_copies(plan, copies, held)
        rows = pa.concat_tables([conform(plan.table, fresh), conform(plan.table, copies)])
    files = stage_with(plan, rows, kept)
    new = count_rows(connection, quote(driver))
    return Staged(
        files, remove, scope_of([*files, *remove]), new_input_rows=new, rows=rows.num_rows, rejected=rejected, note=note
    )


def _with_copies(plan: Plan, rows: pa.Table, held: Sequence[DataFile]) -> pa.Table:
    """Those of the rows whose key is there already, or comes more than once: of the table only what lies near them is read."""
    connection = plan.connection
    key = ", ".join(f'"{c}"' for c in plan.declared.primary_key)
    connection.register("__rows", rows)
    again = f"SELECT {key} FROM __rows GROUP BY {key} HAVING count(*) > 1"
    there = f"SELECT {key} FROM {_near(plan, rows, held)} UNION ALL {again}"
    return connection.execute(f"SELECT * FROM __rows SEMI JOIN ({there}) USING ({key})").to_arrow_table()


def _near(plan: Plan, rows: pa.Table, held: Sequence[DataFile]) -> str:
    """What of the files `held` lies near the rows, as an SQL table expression with `filename`."""
    part = plan.declared.partition[0].column
    if not held:
        return f"(SELECT *, CAST(NULL AS VARCHAR) AS filename FROM {empty_sql(plan.table)})"
    return among_sql(plan.table, held, part, rows.column(part))


def _first_copies(
    plan: Plan, rows: pa.Table, known: Sequence[DataFile]
) -> tuple[pa.Table, list[DataFile], pa.Table | None, dict[str, str]]:
    """Of the copies of a key the lowest in `first_by` counts, whatever the order in which batches bring them.

    Returns:
        The rows to insert; the files that hold a later copy of one of them, and the other rows of those files; and REDATED,
        if a row that goes away is earlier, by the declared time, than the one that comes.
    """
    connection, build = plan.connection, plan.declared.build
    key = ", ".join(f'"{c}"' for c in plan.declared.primary_key)
    connection.register("__rows", rows)
    columns = ", ".join(f'"{c}"' for c in plan.declared.column_names)
    near = _near(plan, rows, known)
    there = pl.DataFrame(
        connection.execute(f"SELECT {columns}, filename FROM {near} SEMI JOIN __rows USING ({key})").to_arrow_table()
    )
    keys, new = plan.declared.primary_key, pl.DataFrame(conform(plan.table, rows))
    copies = pl.concat([there, new.with_columns(pl.lit(None, pl.String).alias("filename"))], how="vertical_relaxed")
    copies = copies.with_columns(pl.col("filename").is_null().alias("__new"))  # of equals the copy that is there counts
    winners, conflicts = first_copies(copies, keys=keys, first_by=[*build.first_by, "__new"], content=build.conflict_on)
    if not conflicts.is_empty():
        plan.reject(conflict_letters(conflicts, build.first_by[0]))
    insert = winners.filter("__new")
    late = insert.join(there.rename({c: f"__there_{c}" for c in there.columns if c not in keys}), on=keys)
    rows = insert.drop("filename", "__new").to_arrow()
    by_path = {path_for_duckdb(f.file_path): f for f in known}
    remove = [by_path[path] for path in sorted(set(late["__there_filename"]))]
    if not remove:
        return rows, [], None, {}
    connection.register("__late", late.select(keys).to_arrow())
    redated = build.time is not None and late.filter(pl.col(build.time) > pl.col(f"__there_{build.time}")).height > 0
    return rows, remove, other_rows(plan, remove, "__late", key), {REDATED: "true"} if redated else {}
