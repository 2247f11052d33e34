"""Building by insertion: rows of new driver rows come in if their key is not there yet; of its copies the first counts."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pyarrow as pa
from pyiceberg.manifest import DataFile

from lakehouse.commit import scope_of
from lakehouse.coordinates import COORDINATES
from lakehouse.copies import conflict_letters, first_copies
from lakehouse.dead_letters import understood
from lakehouse.heads import REDATED
from lakehouse.ids import probe_files
from lakehouse.keyed import among_sql
from lakehouse.lake import IGNORED, ignored_records
from lakehouse.live import files_where
from lakehouse.plans import Plan, Staged, count_rows, frame, other_rows, stage_with
from lakehouse.queries import bind_sql, empty_sql, fetch, files_sql, path_for_duckdb, quote
from lakehouse.staging import conform

INDEXED_ROWS = 50_000
"""From so many rows on a file gets an index; to read a name from a smaller one costs no more than to make and keep one."""


def insert(plan: Plan) -> Staged:
    """Insert the rows whose primary key is not in the table yet; what is there is looked up by the name of the record.

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
    rows = conform(plan.table, built.rows)
    remove: list[DataFile] = []
    kept = None
    note: dict[str, str] = {}
    copies, held = _with_copies(plan, rows)
    if (others := _about_another(plan, copies, held)).num_rows:
        differs = ", ".join(c for c in plan.declared.primary_key if c not in plan.declared.build.record)
        told = pl.DataFrame(others).with_columns(pl.lit(differs).alias("differs"))
        rejected += plan.reject(conflict_letters(told, plan.declared.build.first_by[0]))
        rows, copies = (_not_delivered_with(plan, part, others) for part in (rows, copies))
    if copies.num_rows:
        key = ", ".join(f'"{c}"' for c in plan.declared.primary_key)
        connection.register("__rows", rows)
        connection.register("__copies", copies)
        fresh = fetch(connection, f"SELECT * FROM __rows ANTI JOIN __copies USING ({key})")
        copies, remove, kept, note = _first_copies(plan, copies, held)
        rows = pa.concat_tables([conform(plan.table, fresh), conform(plan.table, copies)])
    files = stage_with(plan, rows, kept)
    new = count_rows(connection, quote(driver))
    if ignored := ignored_records(plan.table) + (built.ignored if plan.again is None else 0):
        note |= {IGNORED: str(ignored)}
    return Staged(
        files, remove, scope_of([*files, *remove]), new_input_rows=new, rows=rows.num_rows, rejected=rejected, note=note
    )


def _with_copies(plan: Plan, rows: pa.Table) -> tuple[pa.Table, list[DataFile]]:
    """Those of the rows that may be there already or come more than once, and the files that may hold a copy of one."""
    connection, build = plan.connection, plan.declared.build
    key = ", ".join(quote(c) for c in plan.declared.primary_key)
    name = f"hash({', '.join(quote(c) for c in build.record or plan.declared.primary_key)})"
    connection.register("__rows", rows)
    ids = frame(connection, f"SELECT DISTINCT {name} AS id FROM __rows ORDER BY 1")["id"]
    found = _known(plan, name, ids) if rows.num_rows else {}
    connection.register("__ids", pl.concat([ids.clear(), *found.values()]).unique().to_frame("id").to_arrow())
    again = f"SELECT {key} FROM __rows GROUP BY {key} HAVING count(*) > 1"
    copies = f"SELECT * FROM __rows WHERE {name} IN (SELECT id FROM __ids) OR ({key}) IN ({again})"
    return fetch(connection, copies), list(found)


def _known(plan: Plan, name: str, ids: pl.Series) -> dict[DataFile, pl.Series]:
    """Which of the ids (hashes, sorted) each file may hold; `name` is the SQL of a row's. Files without any are left out.

    Of large files that is looked up in an index (lakehouse/ids.py), so that it costs what the batch costs; of small ones the
    columns that name the record are read.
    """
    connection, files = plan.connection, files_where(plan.table, None, plan.base)
    found: dict[DataFile, pl.Series] = {}
    small = {path_for_duckdb(f.file_path): f for f in files if f.record_count < INDEXED_ROWS}
    if small:
        held = files_sql(plan.table, small.values())
        connection.register("__ids", ids.to_frame("id").to_arrow())
        hits = frame(connection, f"SELECT filename, {name} AS id FROM {held} WHERE {name} IN (SELECT id FROM __ids)")
        found = {small[str(path)]: part["id"] for (path,), part in hits.group_by("filename")}
    large = [(file, ids) for file in files if file.record_count >= INDEXED_ROWS]
    for (file, _), hit in zip(large, probe_files(connection, plan.id_indexes, plan.table, large, {"id": name}), strict=True):
        if not hit.is_empty():
            found[file] = ids[hit["at"]]
    return found


def _about_another(plan: Plan, copies: pa.Table, held: Sequence[DataFile]) -> pa.Table:
    """Those of the rows that say of a record which the table has that it is about something else."""
    connection, build = plan.connection, plan.declared.build
    if build.own is None or not held or not copies.num_rows:
        return copies.slice(0, 0)
    key, record = (", ".join(quote(c) for c in names) for names in (plan.declared.primary_key, build.record))
    connection.register("__copies", copies)
    unknown = f"SELECT * FROM __copies ANTI JOIN (SELECT {key} FROM {_near(plan, copies, held)}) USING ({key}) WHERE {build.own}"
    connection.register("__unknown", others := fetch(connection, unknown))
    if not others.num_rows:  # nearly always: a copy is found where its object is, without a look at all the names in a file
        return others
    there = f"SELECT {record} FROM {files_sql(plan.table, held)} WHERE {build.own}"
    return fetch(connection, f"SELECT * FROM __unknown SEMI JOIN ({there}) USING ({record})")


def _not_delivered_with(plan: Plan, rows: pa.Table, others: pa.Table) -> pa.Table:
    """The rows that came in other records of the topic than `others`."""
    plan.connection.register("__part", rows)
    plan.connection.register("__others", others)
    using = ", ".join(quote(c) for c in COORDINATES)
    return fetch(plan.connection, f"SELECT * FROM __part ANTI JOIN __others USING ({using})")


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
    there = frame(connection, f"SELECT {columns}, filename FROM {near} SEMI JOIN __rows USING ({key})")
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
