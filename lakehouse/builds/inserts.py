"""Building by insertion: rows of new driver rows come in if their key is not there yet; of its copies the first counts."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pyarrow as pa
from pyiceberg.manifest import DataFile

from lakehouse.commit import scope_of
from lakehouse.copies import conflict_letters, first_copies
from lakehouse.dead_letters import understood
from lakehouse.heads import heads_sql
from lakehouse.plans import Plan, Staged, count_rows, live_files, other_rows, stage_with
from lakehouse.predicates import one_of
from lakehouse.queries import among, bind_sql, files_sql, path_for_duckdb, quote
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
    fresh, suspects = _split_fresh(plan, rows)
    known = live_files(plan, one_of(part, suspects.column(part).to_pylist())) if suspects.num_rows else []
    remove: list[DataFile] = []
    kept = None
    if known:
        suspects, remove, kept = _first_copies(plan, suspects, known)
        rows = pa.concat_tables([conform(plan.table, fresh), conform(plan.table, suspects)])
    files = stage_with(plan, rows, kept)
    new = count_rows(connection, quote(driver))
    return Staged(files, remove, scope_of([*files, *remove]), new_input_rows=new, rows=rows.num_rows, rejected=rejected)


def _split_fresh(plan: Plan, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(rows that cannot be there yet, the others): what is later than all that is known of its object is no copy of it."""
    part = plan.declared.partition[0].column
    heads = heads_sql(plan, rows.column(part).to_pylist()) if rows.num_rows else None
    if heads is None:
        return rows.slice(0, 0), rows
    connection, time = plan.connection, plan.declared.build.time
    connection.register("__rows", rows)
    on = ", ".join(f'"{c}"' for c in plan.lake.declaration(str(plan.declared.build.heads)).primary_key)
    late = f'FROM __rows AS r JOIN {heads} AS h USING ({on}) WHERE r."{time}" <= h."{time}"'
    key = ", ".join(f'"{c}"' for c in plan.declared.primary_key)
    suspects = connection.execute(f"SELECT r.* {late}").to_arrow_table()
    connection.register("__suspects", suspects)
    return connection.execute(f"SELECT * FROM __rows ANTI JOIN __suspects USING ({key})").to_arrow_table(), suspects


def _first_copies(plan: Plan, rows: pa.Table, known: Sequence[DataFile]) -> tuple[pa.Table, list[DataFile], pa.Table | None]:
    """Of the copies of a key the lowest in `first_by` counts, whatever the order in which batches bring them.

    Returns:
        The rows to insert; the files that hold a later copy of one of them, and the other rows of those files.
    """
    connection, build = plan.connection, plan.declared.build
    key = ", ".join(f'"{c}"' for c in plan.declared.primary_key)
    connection.register("__rows", rows)
    held = files_sql(plan.table, (f.file_path for f in known))
    columns = ", ".join(f'"{c}"' for c in plan.declared.column_names)
    part = plan.declared.partition[0].column
    near = f"(FROM {held} WHERE {among(quote(part), rows.column(part))})"
    there = pl.DataFrame(
        connection.execute(f"SELECT {columns}, filename FROM {near} SEMI JOIN __rows USING ({key})").to_arrow_table()
    )
    if there.is_empty():
        return rows, [], None
    keys, new = plan.declared.primary_key, pl.DataFrame(conform(plan.table, rows))
    copies = pl.concat([there, new.with_columns(pl.lit(None, pl.String).alias("filename"))], how="vertical_relaxed")
    copies = copies.with_columns(pl.col("filename").is_null().alias("__new"))  # of equals the copy that is there counts
    winners, conflicts = first_copies(copies, keys=keys, first_by=[*build.first_by, "__new"], content=build.conflict_on)
    if not conflicts.is_empty():
        plan.reject(conflict_letters(conflicts, build.first_by[0]))
    insert = winners.filter("__new")
    late = insert.join(there.select(*keys, pl.col("filename").alias("replaced")), on=keys)
    rows = insert.drop("filename", "__new").to_arrow()
    by_path = {path_for_duckdb(f.file_path): f for f in known}
    remove = [by_path[path] for path in sorted(set(late["replaced"]))]
    if not remove:
        return rows, [], None
    connection.register("__late", late.select(keys).to_arrow())
    return rows, remove, other_rows(plan, remove, "__late", key)
