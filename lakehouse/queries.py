"""One way to run SQL: DuckDB, with every Iceberg table as a view under its own name, now or as of a time or snapshot."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import sqlglot
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.types import IcebergType, ListType, StructType
from sqlglot import exp

from lakehouse.declarations import load_reference
from lakehouse.errors import UsageError
from lakehouse.lake import Lake, snapshot_at
from lakehouse.live import deletes_of
from lakehouse.outages import reaching
from lakehouse.settings import Settings

ICEBERG_EXTENSIONS = ("avro", "iceberg")
MAX_LITERALS = 5_000
"""Longer lists cost more than they spare. (With 1,000 a whole build, whose slices ask for 2,000 keys, takes half more time.)"""
REFERENCE = "reference"
POSITION = "file_row_number"
"""DuckDB's name of a row's place in its file, from 0."""


def _extension_path(name: str) -> Path:
    """The extension binary in its PyPI wheel, loadable offline."""
    module = importlib.import_module(f"duckdb_extension_{name}")
    assert module.__file__
    return next((Path(module.__file__).parent / "extensions" / f"v{duckdb.__version__}").glob("*.duckdb_extension"))


def _load(connection: duckdb.DuckDBPyConnection, names: Iterable[str]) -> None:
    for name in names:
        connection.execute(f"LOAD '{_extension_path(name)}'")


@cache
def _engine(memory: str, threads: int, temporary: Path, s3_secret: str) -> duckdb.DuckDBPyConnection:
    """The one DuckDB instance of this process: loading the Iceberg extension into a new one takes 0.1 to 0.2 s."""
    engine = duckdb.connect(
        config={
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_persistent_secrets": False,  # those are the developer's own
            "memory_limit": memory,
            "threads": threads,
            "temp_directory": str(temporary),
            "preserve_insertion_order": False,
        }
    )
    _load(engine, ("icu",))
    if s3_secret:
        _load(engine, ("httpfs", "aws") if "credential_chain" in s3_secret else ("httpfs",))
        engine.execute(s3_secret)
    return engine


def s3_secret_sql(settings: Settings) -> str:
    """The statement that tells DuckDB how the object store is reached; empty if data files are local. It holds the keys."""
    if not settings.iceberg_warehouse.startswith("s3:"):
        return ""
    options: dict[str, str] = {"TYPE": "s3"}
    if settings.s3_region:
        options["REGION"] = settings.s3_region
    if settings.s3_endpoint:
        scheme, _, place = settings.s3_endpoint.partition("://")
        options |= {"ENDPOINT": place.rstrip("/"), "URL_STYLE": "path", "USE_SSL": str(scheme == "https").lower()}
    if settings.s3_access_key_id and settings.s3_secret_access_key:
        options |= {"KEY_ID": settings.s3_access_key_id, "SECRET": settings.s3_secret_access_key.get_secret_value()}
        if settings.s3_session_token:
            options["SESSION_TOKEN"] = settings.s3_session_token.get_secret_value()
    else:
        options |= {"PROVIDER": "credential_chain", "REFRESH": "auto"}
    return f"CREATE SECRET lake ({', '.join(f'{name} {text(value)}' for name, value in options.items())})"


_numbers = itertools.count()


@contextmanager
def connect(settings: Settings) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection in UTC with an empty catalog of its own, within the declared memory and threads.

    Bind tables to it with `bind_table` and `bind_arrow`; they are gone when the context ends.
    """
    engine = _engine(settings.duckdb_memory, settings.duckdb_threads, settings.home / "tmp", s3_secret_sql(settings))
    with engine.cursor() as connection:
        own = f"work_{next(_numbers)}"
        connection.execute(f"ATTACH ':memory:' AS {own}")
        connection.execute(f"USE {own}")
        connection.execute("SET TimeZone = 'UTC'")
        try:
            yield connection
        finally:
            connection.execute("USE memory")
            connection.execute(f"DETACH {own}")


def fetch(connection: duckdb.DuckDBPyConnection, sql: str, parameters: Mapping[str, Any] | None = None) -> pa.Table:
    """The rows of a query: of one without parameters all threads make them, where `execute` hands them on through one.

    (With parameters that way would lose the order of the rows.)
    """
    if parameters:
        return connection.execute(sql, dict(parameters)).to_arrow_table()
    return connection.sql(sql).to_arrow_table()


def scan_sql(connection: duckdb.DuckDBPyConnection, table: Table, snapshot_id: int) -> str:
    """The table at a snapshot as an SQL table expression of `connection`; it prunes files by statistics."""
    # the first time it takes 0.1 s or more, after that nothing: only a process that scans pays for it
    _load(connection, ICEBERG_EXTENSIONS)
    return f"iceberg_scan({text(table.metadata_location)}, snapshot_from_id = {snapshot_id})"


def path_for_duckdb(path: str) -> str:
    """The path of a data file as DuckDB's `filename` column will show it: a local file has no scheme there."""
    return path.removeprefix("file://")


def local_path_sql(column: str) -> str:
    """SQL: the same of a column."""
    return f"regexp_replace({column}, '^file://', '')"


def files_sql(table: Table, files: Iterable[DataFile], *, numbered: bool = False) -> str:
    """The rows of live data files of a table as an SQL table expression with the table's columns and `filename`.

    Columns are found by field id, so files written before a column was added have NULL there. numbered: with
    `file_row_number`, the position of the row in its file.
    """
    whole: list[str] = []
    with_deletes: list[str] = []
    deletes: list[str] = []
    for file in files:
        (with_deletes if deletes_of(file) else whole).append(file.file_path)
        deletes += (d.file_path for d in deletes_of(file))
    if not deletes:
        return _read_sql(table, whole, numbered=numbered)
    columns = "*" if numbered else f"* EXCLUDE ({POSITION})"
    left = (
        f"SELECT {columns} FROM {_read_sql(table, with_deletes, numbered=True)} AS r "
        f"ANTI JOIN {positions_sql(deletes)} AS d USING (filename, {POSITION})"
    )
    return f"({left} UNION ALL FROM {_read_sql(table, whole, numbered=numbered)})" if whole else f"({left})"


def positions_sql(paths: Iterable[str]) -> str:
    """What position delete files say, as an SQL table expression: `filename` (as DuckDB gives it) and `file_row_number`."""
    return (
        f"(SELECT {local_path_sql('file_path')} AS filename, pos AS {POSITION} "
        f"FROM read_parquet({_listed(paths)}, hive_partitioning = false))"
    )


def rows_at_sql(table: Table, paths: Iterable[str], deletes: Iterable[DataFile], but: Iterable[DataFile] = ()) -> str:
    """The rows of data files (by their Iceberg paths) that `deletes` name and `but` does not, as `files_sql` gives rows."""
    named, kept = ([f.file_path for f in files] for files in (deletes, but))
    at = positions_sql(named)
    if kept:
        at = f"(FROM {at} AS a ANTI JOIN {positions_sql(kept)} AS b USING (filename, {POSITION}))"
    read = _read_sql(table, paths, numbered=True)
    return f"(SELECT * EXCLUDE ({POSITION}) FROM {read} AS r SEMI JOIN {at} AS d USING (filename, {POSITION}))"


def _read_sql(table: Table, paths: Iterable[str], *, numbered: bool) -> str:
    fields = ", ".join(
        f"{f.field_id}: {{name: '{f.name}', type: '{duckdb_type(f.field_type)}', default_value: NULL}}"
        for f in table.schema().fields
    )
    options = "filename = true, hive_partitioning = false" + (f", {POSITION} = true" if numbered else "")
    return f"read_parquet({_listed(paths)}, schema = MAP {{{fields}}}, {options})"


def staged_sql(paths: Iterable[str]) -> str:
    """Files just written, all of one schema, as an SQL table expression."""
    return f"read_parquet({_listed(paths)}, hive_partitioning = false)"


def _listed(paths: Iterable[str]) -> str:
    return "[" + ", ".join(text(path_for_duckdb(p)) for p in paths) + "]"


DUCKDB_TYPES = {
    "binary": "BLOB",
    "boolean": "BOOLEAN",
    "date": "DATE",
    "double": "DOUBLE",
    "float": "FLOAT",
    "int": "INTEGER",
    "long": "BIGINT",
    "string": "VARCHAR",
    "timestamp": "TIMESTAMP",
    "timestamptz": "TIMESTAMPTZ",
    "uuid": "UUID",
}


def duckdb_type(kind: IcebergType) -> str:
    """DuckDB's name of an Iceberg type."""
    if isinstance(kind, ListType):
        return f"{duckdb_type(kind.element_type)}[]"
    if isinstance(kind, StructType):
        return "STRUCT(" + ", ".join(f'"{f.name}" {duckdb_type(f.field_type)}' for f in kind.fields) + ")"
    return DUCKDB_TYPES.get(str(kind)) or str(kind).upper()  # decimal(p, s) is spelt alike


def text(value: str) -> str:
    """`value` as an SQL string."""
    return "'" + value.replace("'", "''") + "'"


def epoch_time(value: str) -> str:
    """SQL: the time of `value` (SQL of text) as seconds since 1970; NULL if it is no number, or outside the years 1 to 9999.

    Python and Arrow hold no other years: one such value in a batch would be an error where somebody reads it.
    """
    seconds = f"TRY_CAST({value} AS BIGINT)"
    return f"CASE WHEN {seconds} BETWEEN -62135596800 AND 253402300799 THEN to_timestamp({seconds}) END"


def quote(name: str) -> str:
    """`layer.table` as a quoted SQL identifier."""
    return ".".join(f'"{part}"' for part in name.split("."))


def among(column: str, values: pa.ChunkedArray) -> str:
    """SQL: the column has one of the values, as literals: only so does DuckDB skip row groups (a join does it for up to 50)."""
    strings = pa.types.is_string(values.type) or pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type)
    if not strings or len(values) > MAX_LITERALS:
        return "true"
    found = sorted({v for v in values.to_pylist() if v is not None})
    return f"{column} IN ({', '.join(text(v) for v in found)})" if found else "false"


def empty_sql(table: Table) -> str:
    """No rows, with the columns and types of the table, as an SQL table expression."""
    columns = ", ".join(f'CAST(NULL AS {duckdb_type(f.field_type)}) AS "{f.name}"' for f in table.schema().fields)
    return f"(SELECT {columns} WHERE false)"


def bind_table(connection: duckdb.DuckDBPyConnection, name: str, table: Table, snapshot_id: int | None) -> None:
    """Make `name` a view of the table at a snapshot; at None it is an empty relation with the table's columns."""
    if snapshot_id is None:
        bind_arrow(connection, name, schema_to_pyarrow(table.schema(), include_field_ids=False).empty_table())
        return
    connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{name.split(".")[0]}"')
    connection.execute(f"CREATE OR REPLACE VIEW {quote(name)} AS SELECT * FROM {scan_sql(connection, table, snapshot_id)}")


def bind_sql(connection: duckdb.DuckDBPyConnection, name: str, relation: str) -> None:
    """Make `layer.table` a view of an SQL table expression."""
    connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{name.split(".")[0]}"')
    connection.execute(f"CREATE OR REPLACE VIEW {quote(name)} AS SELECT * FROM {relation}")


def bind_arrow(connection: duckdb.DuckDBPyConnection, name: str, rows: pa.Table | pa.RecordBatchReader) -> None:
    """Make `layer.table` a view of Arrow data that is already in memory."""
    schema, _, short = name.partition(".")
    connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
    registered = f"__{schema}_{short}"
    connection.register(registered, rows)
    connection.execute(f"CREATE OR REPLACE VIEW {quote(name)} AS SELECT * FROM {registered}")


def bind_reference(connection: duckdb.DuckDBPyConnection, catalog_dir: Path, names: Iterable[str]) -> None:
    """Make each `reference.NAME` among the names a view of `catalog/reference/NAME.yaml`: a list of rows, or one.

    Raises:
        DeclarationError: there is no such file.
    """
    for name in names:
        schema, _, short = name.partition(".")
        if schema != REFERENCE:
            continue
        rows = load_reference(catalog_dir, short)
        bind_arrow(connection, name, pa.Table.from_pylist(rows if isinstance(rows, list) else [rows]))


@lru_cache(512)  # parsing takes 20 ms and more, and a run asks for the same statements in each batch
def _names_in(sql: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tables, parameters) that a query names; see `tables_read` and `parameters_of`."""
    try:
        tree = sqlglot.parse_one(sql, dialect="duckdb")
    except sqlglot.errors.ParseError as error:
        first = error.errors[0]
        raise UsageError(f"SQL error at line {first['line']}, column {first['col']}: {first['description']}") from None
    except sqlglot.errors.TokenError as error:
        raise UsageError(f"SQL error: {str(error).splitlines()[0]}") from None
    tables = {f"{t.db}.{t.name}".lower() for t in tree.find_all(exp.Table) if t.db}
    return tuple(sorted(tables)), tuple(sorted({p.name for p in tree.find_all(exp.Placeholder)}))


def tables_read(sql: str) -> tuple[str, ...]:
    """The `layer.table` names a query reads, from its own text, in lower case (SQL does not mind).

    Raises:
        UsageError: the SQL does not parse; the message says where.
    """
    return _names_in(sql)[0]


def parameters_of(sql: str) -> tuple[str, ...]:
    """The named parameters (`$name`) of a query; raises as `tables_read` does."""
    return _names_in(sql)[1]


def query(
    lake: Lake,
    sql: str,
    as_of: datetime | int | None = None,
    parameters: Mapping[str, Any] | None = None,
    on_connection: Callable[[duckdb.DuckDBPyConnection], None] | None = None,
) -> pa.Table:
    """Run one query over the lake (and `reference.NAME`, catalog/reference) and return its rows.

    as_of: a time (each table at the snapshot that was current then) or a snapshot id (of one of the tables read: the
    other tables at the time that snapshot was made). on_connection: is given what `interrupt()` stops the query with.

    Raises:
        UsageError: the SQL is wrong, a table is missing, or no snapshot has the id.
    """
    with connect(lake.settings) as connection:
        if on_connection:
            on_connection(connection)
        try:
            with reaching("reading the lake"):
                names = tables_read(sql)
                bind_reference(connection, lake.settings.catalog_dir, names)
                bind_lake(connection, lake, [t for t in names if t in lake.declarations], as_of)
                return connection.execute(sql, dict(parameters or {})).to_arrow_table()
        except (duckdb.CatalogException, duckdb.BinderException, duckdb.ParserException, duckdb.InvalidInputException) as error:
            raise UsageError(f"SQL error: {error}\nThe tables: {', '.join(lake.declarations)}") from None
        except duckdb.Error as error:
            raise UsageError(f"SQL error: {error}") from None


def bind_lake(
    connection: duckdb.DuckDBPyConnection, lake: Lake, names: Iterable[str], as_of: datetime | int | None = None
) -> dict[str, int | None]:
    """Bind each table to its name, now or as of a time or snapshot id; returns {table: snapshot id}."""
    tables = {name: lake.load(name) for name in names}
    if isinstance(as_of, int):
        owner = next((s for t in tables.values() if (s := t.snapshot_by_id(as_of))), None)
        if owner is None:
            raise UsageError(
                f"none of the tables read ({', '.join(tables) or 'none'}) has a snapshot {as_of}; see: lakehouse show TABLE"
            )
        moment = datetime.fromtimestamp(owner.timestamp_ms / 1000, UTC)
    else:
        moment = as_of or datetime.now(UTC)
    bound: dict[str, int | None] = {}
    for name, table in tables.items():
        if isinstance(as_of, int) and table.snapshot_by_id(as_of) is not None:
            bound[name] = as_of
        elif as_of is None:
            current = table.current_snapshot()
            bound[name] = current.snapshot_id if current else None
        else:
            snapshot = snapshot_at(table, name, moment)
            bound[name] = snapshot.snapshot_id if snapshot else None
        bind_table(connection, name, table, bound[name])
    return bound
