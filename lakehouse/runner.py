"""Running transforms: plan on a consistent cut of the inputs, build, stage, check, and commit with the positions reached.

Each table advances by what is new for it: rows of its driver between its own positions and the cut. Those rows are
inserted (`insert`), or name the keys whose rows are computed again from all their versions (`merge`), so the same
transform serves the smallest batch and a full rebuild. Running a range again is harmless.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.expressions import AlwaysTrue, BooleanExpression, Not
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.transforms import BucketTransform
from pyiceberg.types import StringType

from lakehouse.checks import check_staged
from lakehouse.commit import Change, Scope, commit, scope_of
from lakehouse.copies import conflict_letters, first_copies
from lakehouse.dead_letters import write_dead_letters
from lakehouse.declarations import Declaration
from lakehouse.errors import Fenced, LakehouseError, Replan, Retryable, UsageError
from lakehouse.heads import heads_as_versions, heads_sql, split_keys
from lakehouse.lake import Lake, newest_within, snapshot_vector
from lakehouse.positions import TopicPartition, Vector, vector_of
from lakehouse.predicates import all_of, any_of, at_least, below, equal, is_null, one_of
from lakehouse.queries import bind_sql, bind_table, connect, duckdb_type, files_sql, path_for_duckdb, quote, text
from lakehouse.scd2 import scd2_update
from lakehouse.staging import conform, stage
from lakehouse.transforms import Inputs, Transform, load_transforms, upstream

MAX_PLANS = 20
MAX_LITERALS = 5_000
SLICE_ROWS, SLICES = 1_000_000, 16
"""A table built whole from more driver rows than this is built in that many slices of its keys."""
GAP = 50_000  # offsets: coordinates further apart than this are looked for as two ranges

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """What one run of one table did. rows: written; rejected: new dead letters; caught_up: nothing is left to do."""

    table: str
    snapshot_id: int | None
    new_input_rows: int = 0
    rows: int = 0
    rejected: int = 0
    files_added: int = 0
    files_removed: int = 0
    seconds: float = 0.0
    caught_up: bool = True


@dataclass(frozen=True)
class Plan:
    """What is to be done for one table: the state it starts from, its inputs at the cut, and the offsets to reach."""

    lake: Lake
    declared: Declaration
    transform: Transform
    table: Table
    base: int | None
    expected: dict[TopicPartition, int]
    reached: dict[TopicPartition, int]
    pinned: dict[str, tuple[Table, int | None]]
    connection: duckdb.DuckDBPyConnection
    caught_up: bool
    again: pa.Table | None = None
    """Coordinates (topic, partition, offset) of raw records to take up again, below the positions (lakehouse/replay.py)."""
    refused: list[pa.Table] = field(default_factory=list)

    def inputs(self) -> Inputs:
        """The inputs as the transform sees them."""
        return Inputs(self.connection, self.lake.settings.catalog_dir)

    def bind(self, names: Iterable[str]) -> None:
        """Bind input tables, at the cut, to their names."""
        for name in names:
            bind_table(self.connection, name, *self.pinned[name])

    def bind_own(self) -> None:
        """Bind the table itself, as it was when the plan began, to its name."""
        bind_table(self.connection, self.declared.table, self.table, self.base)

    def snapshots(self) -> dict[str, int]:
        """The snapshot of each input, as the commit records it."""
        return {name: snapshot for name, (_, snapshot) in self.pinned.items() if snapshot is not None}

    def new_rows_sql(self, name: str) -> str:
        """Rows of an input whose coordinates lie between the positions expected and reached, as an SQL table expression.

        In a replay, instead: its rows at the coordinates that are taken up again.
        """
        table, snapshot = self.pinned[name]
        if self.again is not None:
            return coordinates_sql(self.connection, table, snapshot, self.again)
        ranges = {k: (self.expected.get(k, 0), end) for k, end in self.reached.items() if end > self.expected.get(k, 0)}
        return ranges_sql(table, snapshot, ranges)

    def reject(self, refused: pa.Table | None) -> int:
        """Keep the records that the transform cannot use as dead letters, before the rows; returns how many are new.

        In a replay they have their letters already: what is said of them now is kept for the end of it.
        """
        if refused is None or refused.num_rows == 0:
            return 0
        if self.again is not None:
            rows, keys = pl.DataFrame(refused), ["topic", "partition", "offset"]
            again = pl.DataFrame(self.again.select(keys))
            self.refused.append(rows.join(again, on=keys, how="semi").to_arrow())
            refused = rows.join(again, on=keys, how="anti").to_arrow()
        return write_dead_letters(self.lake, self.declared.table, refused)

    def new_rows(self, name: str, columns: str) -> pa.Table:
        """The same rows in memory; `columns` is an SQL select list."""
        return self.connection.execute(f"SELECT {columns} FROM {self.new_rows_sql(name)}").to_arrow_table()


@dataclass(frozen=True)
class Staged:
    """The files of one plan, ready to be committed: added, removed, where the rewrite must have been alone."""

    add: Sequence[DataFile]
    remove: Sequence[DataFile] = ()
    scope: Scope = "table"
    new_input_rows: int = 0
    rows: int = 0
    rejected: int = 0


def ranges_sql(table: Table, snapshot: int | None, ranges: Mapping[TopicPartition, tuple[int, int]]) -> str:
    """Rows of a table that carries coordinates, for half-open offset ranges {(topic, partition): (from, to)}, as SQL.

    Iceberg's statistics choose the files, so the cost is that of the ranges and not of the table.
    """
    return _spans_sql(table, snapshot, [(*key, *span) for key, span in sorted(ranges.items())])


def coordinates_sql(connection: duckdb.DuckDBPyConnection, table: Table, snapshot: int | None, coordinates: pa.Table) -> str:
    """Rows of a table that carries coordinates, at exactly these (columns topic, partition, offset), as SQL.

    The relation `__coordinates` of the connection holds them. Only files that may hold one of them are read.
    """
    columns = ["topic", "partition", "offset"]
    spans: list[tuple[str, int, int, int]] = []
    for topic, partition, offset in sorted(zip(*(coordinates.column(c).to_pylist() for c in columns), strict=True)):
        last = spans[-1] if spans else None
        if last and last[:2] == (topic, partition) and offset - last[3] < GAP:
            spans[-1] = (*last[:3], offset + 1)
        else:
            spans.append((topic, partition, offset, offset + 1))
    connection.register("__coordinates", coordinates.select(columns))
    return f'(SELECT * FROM {_spans_sql(table, snapshot, spans)} SEMI JOIN __coordinates USING (topic, partition, "offset"))'


def _spans_sql(table: Table, snapshot: int | None, spans: Sequence[tuple[str, int, int, int]]) -> str:
    """Rows whose coordinates lie in one of the half-open spans (topic, partition, from, to)."""
    wanted = any_of(
        all_of((equal("topic", topic), equal("partition", partition), at_least("offset", start), below("offset", end)))
        for topic, partition, start, end in spans
    )
    files = [t.file.file_path for t in table.scan(wanted, snapshot_id=snapshot).plan_files()] if snapshot and spans else []
    if not files:
        empty = ", ".join(f'CAST(NULL AS {duckdb_type(f.field_type)}) AS "{f.name}"' for f in table.schema().fields)
        return f"(SELECT {empty} WHERE false)"
    inside = " OR ".join(
        f'(topic = {text(topic)} AND partition = {partition} AND "offset" >= {start} AND "offset" < {end})'
        for topic, partition, start, end in spans
    )
    columns = ", ".join(f'"{f.name}"' for f in table.schema().fields)
    return f"(SELECT {columns} FROM {files_sql(table, files)} WHERE {inside})"


def consistent_cut(
    lake: Lake, names: Sequence[str], transforms: Mapping[str, Transform]
) -> tuple[dict[TopicPartition, int], dict[str, tuple[Table, int | None]]]:
    """The lowest positions common to the inputs, and for each input the newest snapshot that does not pass them.

    Each topic belongs to the raw table that consumes it; an input counts for the topics of the raw tables it derives from.

    Raises:
        Retryable: an input has no snapshot at the cut (expired, or another input has not been built yet).
    """
    tables = {name: lake.open_for_write(name) for name in names}
    roots = {name: raw_roots(lake, name, transforms) for name in names}
    topics = {raw: lake.vector(raw) for raw in sorted(set().union(*roots.values()))}
    at = {name: (table.current_snapshot(), vector_of(table.metadata, name)) for name, table in tables.items()}
    while True:
        cut = {
            key: min(at[name][1].get(key, 0) for name in names if raw in roots[name])
            for raw, keys in topics.items()
            for key in keys
        }
        # a raw table is read by offset range, so it can be ahead; what derives from it must be as it was at the cut
        ahead = [n for n in names if not n.startswith("raw.") and any(v > cut.get(k, v) for k, v in at[n][1].items())]
        if not ahead:
            return cut, {name: (tables[name], s.snapshot_id if s else None) for name, (s, _) in at.items()}
        for name in ahead:
            snapshot = newest_within(tables[name], name, {k: cut[k] for k in at[name][1] if k in cut})
            if snapshot is None:
                others = ", ".join(n for n in names if n != name)
                raise Retryable(
                    f"{name} is ahead of the other inputs ({others}) and keeps no snapshot at their cut; run those first"
                )
            # it may be below the cut: then the cut is lower than was thought, and the others have to follow
            at[name] = (snapshot, snapshot_vector(snapshot, name))


def raw_roots(lake: Lake, name: str, transforms: Mapping[str, Transform]) -> set[str]:
    """The raw tables that a table derives from (a raw table: itself)."""
    if name not in transforms:
        return {name} if name.startswith("raw.") else set()
    sources = upstream(lake.declaration(name), transforms[name])
    return set().union(*(raw_roots(lake, source, transforms) for source in sources))


def bounded(expected: Vector, cut: Vector, topics: set[str], rows: int) -> tuple[dict[TopicPartition, int], bool]:
    """At most about `rows` offsets of `topics` beyond `expected`, spread over partitions; and whether that reaches the cut."""
    behind = {k: cut[k] - expected.get(k, 0) for k in cut if k[0] in topics and cut[k] > expected.get(k, 0)}
    total = sum(behind.values())
    if total <= rows:
        return dict(cut), True
    return {k: expected.get(k, 0) + -(-behind[k] * rows // total) if k in behind else cut[k] for k in cut}, False


def run_table(lake: Lake, name: str, transforms: Mapping[str, Transform] | None = None) -> Report:
    """Advance one table by at most one micro-batch of its driver.

    Raises:
        Fenced, Replan, RolledBack, ChecksFailed, Terminal: see lakehouse.errors; nothing was published.
    """
    transforms = transforms or load_transforms(lake.settings.transforms_dir, lake.declarations)
    if name not in transforms:
        raise UsageError(f"{name} has no transform: writers fill it (lakehouse ingest)")
    return _planned_again(lambda: _run_once(lake, name, transforms)[0])


def take_up_again(
    lake: Lake, name: str, coordinates: pa.Table, transforms: Mapping[str, Transform]
) -> tuple[Report, list[pa.Table]]:
    """Let one table work on raw records that its positions have passed; they stay where they are.

    coordinates: columns topic, partition, offset, of rows of its driver. Again is harmless: a row that is there stays.

    Returns:
        The report, and what the transform still refuses (columns topic, partition, offset, received_at, reason, detail).

    Raises:
        Retryable: an input is ahead of the others, so that its rows could not be seen; run them first.
    """
    return _planned_again(lambda: _run_once(lake, name, transforms, coordinates), (Replan, Fenced))


def _planned_again(attempt: Callable[[], T], outdated: tuple[type[LakehouseError], ...] = (Replan,)) -> T:
    """The attempt's result; it is made again while what it planned on was outdated before it could commit."""
    for number in range(MAX_PLANS):
        try:
            return attempt()
        except outdated:
            if number == MAX_PLANS - 1:
                raise
    raise AssertionError("unreachable")


def _run_once(
    lake: Lake, name: str, transforms: Mapping[str, Transform], again: pa.Table | None = None
) -> tuple[Report, list[pa.Table]]:
    started = time.monotonic()
    declared, transform = lake.declaration(name), transforms[name]
    cut, pinned = consistent_cut(lake, upstream(declared, transform), transforms)
    table = lake.open_for_write(name)
    current = table.current_snapshot()
    expected = vector_of(table.metadata, name)
    driver = declared.build.driver
    topics = {topic for topic, _ in vector_of(pinned[driver][0].metadata, driver)} if driver else set()
    # a merge reads all versions of its keys and cannot stop halfway; what reads new rows alone takes them in slices
    slice_rows = sum(cut.values()) if declared.build.mode in ("merge", "history") else lake.settings.batch_rows
    reached, caught_up = bounded(expected, cut, topics, slice_rows)
    if again is not None:
        reached = dict(expected)
        _refuse_unseen(name, pinned)
    elif current is not None and all(expected.get(k, 0) >= v for k, v in reached.items()):
        return Report(name, None, seconds=time.monotonic() - started), []
    reached = {k: max(v, expected.get(k, 0)) for k, v in reached.items()}
    with connect(lake.settings) as connection:
        plan = Plan(
            lake,
            declared,
            transform,
            table,
            current.snapshot_id if current else None,
            expected,
            reached,
            pinned,
            connection,
            caught_up,
            again,
        )
        staged = BUILDERS[declared.build.mode](plan)
        check_staged(connection, declared, staged.add)
        done = commit(
            table,
            lake.run,
            Change(
                consumer=name,
                expected={k: expected.get(k, 0) for k in reached},
                reached=reached,
                add=staged.add,
                remove=staged.remove,
                rewrite=True,
                base=plan.base,
                scope=staged.scope,
                inputs=plan.snapshots(),
            ),
        )
    report = Report(
        name,
        done.snapshot_id,
        staged.new_input_rows,
        staged.rows,
        staged.rejected,
        len(staged.add),
        len(staged.remove),
        time.monotonic() - started,
        caught_up,
    )
    return report, plan.refused


def _refuse_unseen(name: str, pinned: Mapping[str, tuple[Table, int | None]]) -> None:
    """A replay needs its inputs as they are now: one pinned at an older snapshot may lack the rows that were just replayed."""
    for source, (table, snapshot) in pinned.items():
        current = table.current_snapshot()
        if not source.startswith("raw.") and current is not None and current.snapshot_id != snapshot:
            raise Retryable(f"{name}: its input {source} is ahead of the others; run those first: lakehouse run")


def run(lake: Lake, names: Sequence[str] = (), on_report: Callable[[Report], None] | None = None) -> list[Report]:
    """Advance the tables (default: all), in the order of their inputs, until each has caught up with its inputs."""
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    for name in names:
        lake.declaration(name)
    reports = []
    for name in transforms:
        if names and name not in names:
            continue
        while True:
            report = run_table(lake, name, transforms)
            reports.append(report)
            if on_report:
                on_report(report)
            if report.caught_up:
                break
    return reports


def _insert(plan: Plan) -> Staged:
    """Insert the rows whose primary key is not in the table yet; look only into the partitions the new rows fall in."""
    driver = plan.declared.build.driver
    assert driver
    connection = plan.connection
    bind_sql(connection, driver, plan.new_rows_sql(driver))
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
    files = _stage_with(plan, rows, kept)
    new = _count(connection, quote(driver))
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
    near = f"(FROM {held} WHERE {_among(quote(part), rows.column(part))})"
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
    return rows, remove, _other_rows(plan, remove, "__late", key)


def _other_rows(plan: Plan, files: Sequence[DataFile], keys: str, using: str) -> pa.Table:
    """The rows of `files` that have none of the keys (a relation): what a rewrite of these files must keep."""
    columns = ", ".join(f'"{c}"' for c in plan.declared.column_names)
    held = files_sql(plan.table, (f.file_path for f in files))
    return plan.connection.execute(f"SELECT {columns} FROM {held} ANTI JOIN {keys} USING ({using})").to_arrow_table()


def _stage_with(plan: Plan, rows: pa.Table, kept: pa.Table | None) -> list[DataFile]:
    """Stage `rows` together with the rows kept of the files that they replace."""
    content = rows if kept is None else pa.concat_tables([conform(plan.table, kept), conform(plan.table, rows)])
    return stage(plan.table, plan.declared, content)


def live_files(plan: Plan, where: BooleanExpression) -> list[DataFile]:
    """Files of the plan's base that may hold rows of which `where` is true, by partition and statistics."""
    if plan.base is None:
        return []
    return [t.file for t in plan.table.scan(where, snapshot_id=plan.base).plan_files()]


def _count(connection: duckdb.DuckDBPyConnection, relation: str) -> int:
    return int(connection.execute(f"SELECT count(*) FROM {relation}").fetchall()[0][0])


def _merge(plan: Plan) -> Staged:
    """Replace all rows of the touched keys by what the transform makes of all versions of these keys."""
    new, new_rows, slices = _touched_keys(plan)
    add: list[DataFile] = []
    remove: list[DataFile] = []
    count = 0
    for keys in slices:
        plan.connection.register("__keys", keys)
        _bind_touched(plan, keys, new)
        rows = plan.transform.build(plan.inputs()).rows
        remove, kept = touched_files(plan, "__keys", list(plan.declared.build.by))
        add += _stage_with(plan, rows, kept)
        count += rows.num_rows
    return Staged(add, remove, new_input_rows=new_rows, rows=count)


def _touched_keys(plan: Plan) -> tuple[str, int, list[pa.Table]]:
    """(the new rows of the driver as SQL, how many, the keys they touch): the keys in slices when a table is built whole.

    A slice has the keys of one bucket of the last key column, so that memory does not grow with the table. Only where
    nothing is there yet: two slices could want to rewrite the same file.
    """
    build, connection = plan.declared.build, plan.connection
    assert build.driver
    new = plan.new_rows_sql(build.driver)
    pairs = ", ".join(f'"{source}" AS "{column}"' for column, source in build.by.items())
    keys = connection.execute(f"SELECT DISTINCT {pairs} FROM {new} WHERE {build.where or 'true'}").to_arrow_table()
    new_rows = _count(connection, new)
    if keys.num_rows == 0 or new_rows <= SLICE_ROWS or live_files(plan, AlwaysTrue()):
        return new, new_rows, [keys] if keys.num_rows else []
    bucket = BucketTransform(SLICES).pyarrow_transform(StringType())(keys.column(list(build.by)[-1]))
    return new, new_rows, [part for i in range(SLICES) if (part := keys.filter(pc.equal(bucket, i))).num_rows]


def _bind_touched(plan: Plan, keys: pa.Table, new: str) -> bool:
    """Bind the inputs, restricted to the touched keys; the driver to heads and new rows where these suffice. Whether they did."""
    build = plan.declared.build
    not_late = split_keys(plan, new) if build.time and plan.base is not None else None
    for name in plan.transform.inputs:
        if name != build.driver or not_late is None:
            _bind_restricted(plan, name, keys)
            continue
        connection, table = plan.connection, plan.pinned[name][0]
        late = connection.execute("SELECT * FROM __late").to_arrow_table()
        _bind_restricted(plan, name, late, "__late")
        columns = [(f.name, duckdb_type(f.field_type)) for f in table.schema().fields]
        present = connection.execute("SELECT * FROM __heads LIMIT 0").to_arrow_table().schema
        chosen = ", ".join(f'i."{c}"' for c, _ in columns)
        on = " AND ".join(f'i."{source}" = k."{key}"' for key, source in build.by.items())
        parts = [
            f"SELECT * FROM {quote(name)}",
            heads_as_versions(columns, present, not_late),
            f"SELECT {chosen} FROM {new} AS i WHERE EXISTS (SELECT 1 FROM __keys AS k WHERE {on}) AND {not_late}",
        ]
        connection.execute(f"CREATE OR REPLACE TEMP TABLE __driver AS {' UNION ALL '.join(parts)}")
        bind_sql(connection, name, "__driver")
    return not_late is not None


def _history(plan: Plan) -> Staged:
    """Of the touched keys replace the intervals that change: of most only the open one, of a late one those it splits."""
    module, by = plan.transform.module, list(plan.declared.build.by)
    assert module
    new, new_rows, slices = _touched_keys(plan)
    add: list[DataFile] = []
    remove: list[DataFile] = []
    count = 0
    for keys in slices:
        connection = plan.connection
        connection.register("__keys", keys)
        continued = _bind_touched(plan, keys, new)
        begins = states = module.states(plan.inputs())
        if continued:
            first = pl.DataFrame(connection.execute("SELECT * FROM __first").to_arrow_table())
            begins = states.join(first, on=by).filter(pl.col(module.SCD2["time"]) >= pl.col("first")).drop("first")
        held = _held_intervals(plan, by, continued)
        change = scd2_update(held.drop("filename"), states, begins, **module.SCD2)
        remove, kept = _without(plan, change.remove.join(held, on=change.remove.columns, nulls_equal=True))
        add += _stage_with(plan, change.add.to_arrow(), kept)
        count += change.add.height
    return Staged(add, remove, new_input_rows=new_rows, rows=count)


def _without(plan: Plan, gone: pl.DataFrame) -> tuple[list[DataFile], pa.Table | None]:
    """The live files that hold the rows `gone` (with their `filename`), and the other rows of these files."""
    if gone.is_empty():
        return [], None
    by_path = {path_for_duckdb(f.file_path): f for f in live_files(plan, AlwaysTrue())}
    remove = [by_path[path] for path in sorted(set(gone["filename"]))]
    plan.connection.register("__gone", gone.select(plan.declared.primary_key).to_arrow())
    return remove, _other_rows(plan, remove, "__gone", ", ".join(f'"{c}"' for c in plan.declared.primary_key))


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
    count = _count(plan.connection, late)
    closed = live_files(plan, Not(is_null("valid_to"))) if count else []
    if closed:
        held = files_sql(plan.table, (f.file_path for f in closed))
        parts.append(f"SELECT {columns}, filename FROM {held} SEMI JOIN {late} USING ({using}) WHERE valid_to IS NOT NULL")
    if not parts:
        schema = schema_to_pyarrow(plan.table.schema(), include_field_ids=False)
        return pl.DataFrame(schema.empty_table()).with_columns(pl.lit(None, pl.String).alias("filename"))
    return pl.DataFrame(plan.connection.execute(" UNION ALL ".join(parts)).to_arrow_table())


def _bind_restricted(plan: Plan, name: str, keys: pa.Table, relation: str = "__keys") -> None:
    """Bind an input to its name, restricted to the touched keys (a relation that holds the same as `keys`)."""
    build = plan.declared.build
    table, snapshot = plan.pinned[name]
    columns = [f.name for f in table.schema().fields]
    # the driver is restricted by the columns it is matched on, any other input by the key columns it has
    matched = build.by if name == build.driver else {c: c for c in build.by if c in columns}
    wanted = all_of(one_of(source, keys.column(key).unique().to_pylist()) for key, source in matched.items())
    files = [t.file.file_path for t in table.scan(wanted, snapshot_id=snapshot).plan_files()] if snapshot else []
    if not files:
        bind_table(plan.connection, name, table, None)
        return
    chosen = ", ".join(f'i."{c}"' for c in columns)
    condition = " AND ".join(f'i."{source}" = k."{key}"' for key, source in matched.items()) or "true"
    if name == build.driver:
        condition += f" AND ({_below(plan.reached)})"
    few = "".join(f" AND {_among(f'i.{quote(source)}', keys.column(key))}" for key, source in matched.items())
    bind_sql(
        plan.connection,
        name,
        f"(SELECT {chosen} FROM {files_sql(table, files)} AS i "
        f"WHERE EXISTS (SELECT 1 FROM {relation} AS k WHERE {condition}){few})",
    )


def _among(column: str, values: pa.ChunkedArray) -> str:
    """SQL: the column has one of the values, as literals: only so does DuckDB skip row groups (a join does it for up to 50)."""
    strings = pa.types.is_string(values.type) or pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type)
    if not strings or len(values) > MAX_LITERALS:
        return "true"
    found = sorted({v for v in values.to_pylist() if v is not None})
    return f"{column} IN ({', '.join(text(v) for v in found)})" if found else "false"


def _below(reached: Vector) -> str:
    """SQL: the row's coordinates lie below the positions reached."""
    return " OR ".join(
        f'(topic = {text(topic)} AND partition = {partition} AND "offset" < {end})' for (topic, partition), end in reached.items()
    )


def touched_files(plan: Plan, keys: str, key_columns: Sequence[str]) -> tuple[list[DataFile], pa.Table | None]:
    """The live files that hold any of the keys (a relation), and their rows of other keys, which a rewrite must keep."""
    part = plan.declared.partition[0].column
    values = plan.connection.execute(f'SELECT DISTINCT "{part}" FROM {keys}').to_arrow_table().column(0).to_pylist()
    candidates = live_files(plan, one_of(part, values))
    if not candidates:
        return [], None
    using = ", ".join(f'"{c}"' for c in key_columns)
    by_path = {path_for_duckdb(f.file_path): f for f in candidates}
    held = files_sql(plan.table, (f.file_path for f in candidates))
    hit = plan.connection.execute(f"SELECT DISTINCT filename FROM {held} SEMI JOIN {keys} USING ({using})").fetchall()
    remove = [by_path[path] for (path,) in sorted(hit)]
    if not remove:
        return [], None
    return remove, _other_rows(plan, remove, keys, using)


def _replace(plan: Plan) -> Staged:
    """Replace the whole content by what the transform makes of its inputs at the cut."""
    plan.bind(plan.transform.inputs)
    rows = plan.transform.build(plan.inputs()).rows
    remove = live_files(plan, AlwaysTrue())
    return Staged(stage(plan.table, plan.declared, rows), remove, rows=rows.num_rows)


def _custom(plan: Plan) -> Staged:
    """The transform plans its own files: its module has `plan(plan) -> Staged`."""
    return plan.transform.module.plan(plan)  # type: ignore[union-attr, no-any-return]


BUILDERS: dict[str, Callable[[Plan], Staged]] = {
    "insert": _insert,
    "merge": _merge,
    "history": _history,
    "replace": _replace,
    "custom": _custom,
}
