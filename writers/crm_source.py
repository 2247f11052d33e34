"""The CRM as an SQL database: one read of one of its tables, in columns, with the rows that cannot be used set apart.

Which tables and columns is data (catalog/reference/crm.yaml). Reads are read-only, one statement each (so one state of the
table), and fetched in chunks, so that no row becomes a Python object of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import polars as pl
import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchTableError, ProgrammingError, SQLAlchemyError

from lakehouse.declarations import load_reference
from lakehouse.errors import Retryable, Terminal

MAPPING = "catalog/reference/crm.yaml"
CHUNK_ROWS = 50_000
CONNECT_SECONDS = 10
MOMENT = pl.Datetime("us", "UTC")
TIMES = ("effective_at", "updated_at")
SHOWABLE = (datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC))
WITH_ZONE = r"([Zz]|[+-]\d{2}(:?\d{2})?)$"
# SQLSTATE classes after which the same read fails again: wrong value, wrong login, no such database, wrong statement
TERMINAL_STATES = ("22", "28", "3D", "42")

log = logging.getLogger(__name__)


class CrmTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table of the CRM: its name, the key by our names, and {our column: theirs}."""

    table: str
    key: list[str]
    columns: dict[str, str]

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """The columns of what is read: what is mapped, and the three that every version has."""
        values = [c for c in self.columns if c not in (*TIMES, "deleted")]
        return {c: pl.String() for c in values} | dict.fromkeys(TIMES, MOMENT) | {"deleted": pl.Boolean()}

    @property
    def name(self) -> str:
        """The table's own name, without its schema."""
        return self.table.rpartition(".")[2]


class Crm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """catalog/reference/crm.yaml; what each field means is written there."""

    overlap_minutes: int
    compare_every_hours: int
    largest_share_gone: float
    tables: dict[str, CrmTable]
    times_without_zone_are_utc: bool = False

    @property
    def overlap(self) -> timedelta:
        """How far an incremental read goes back."""
        return timedelta(minutes=self.overlap_minutes)

    @property
    def compare_every(self) -> timedelta:
        """How long a whole comparison may be ago."""
        return timedelta(hours=self.compare_every_hours)


@dataclass(frozen=True)
class Read:
    """What one read found. rows: `CrmTable.schema`, one row a key. unusable: their key columns (NULL where missing), `reason`."""

    rows: pl.DataFrame
    unusable: pl.DataFrame


def load_crm(catalog_dir: Path) -> Crm:
    """The declared mapping.

    Raises:
        Terminal: a field is missing, unknown or of a wrong type.
    """
    where = catalog_dir / "reference" / "crm.yaml"
    try:
        crm = msgspec.convert(load_reference(catalog_dir, "crm"), Crm)
    except msgspec.ValidationError as error:
        raise Terminal(f"{where}: {error}") from None
    for name, spec in crm.tables.items():
        if missing := [c for c in (*spec.key, "updated_at") if c not in spec.columns]:
            raise Terminal(f"{where}: {name}: columns must say where {missing[0]!r} comes from")
    return crm


def read_table(url: str, spec: CrmTable, since: datetime | None = None, *, naive_is_utc: bool = False) -> Read:
    """The rows of a CRM table as they stand: all of them, or those whose `updated_at` is not before `since` (or unreadable).

    Raises:
        Terminal: no such table or column, a column of the wrong type, wrong login. Retryable: the database does not answer.
    """
    with _connected(url) as connection:
        columns = _described(connection, spec, naive_is_utc=naive_is_utc)
        dialect = connection.dialect.name
        streamed = connection.execution_options(stream_results=True, yield_per=CHUNK_ROWS)
        result = streamed.execute(_query(dialect, columns, since))
        chunks = [_frame(dialect, columns, chunk) for chunk in result.partitions()]
    found = pl.concat(chunks, how="vertical_relaxed") if chunks else _frame(dialect, columns, ())
    read = _usable(spec, found, naive_is_utc=naive_is_utc)
    # what SQLite could not compare was read all the same
    return read if since is None else replace(read, rows=read.rows.filter(pl.col("updated_at") >= since))


@contextmanager
def _connected(url: str) -> Iterator[sa.Connection]:
    """A read-only connection; what goes wrong while it is open becomes an error of ours, which never holds the password."""
    try:
        parsed = make_url(url)
        engine = _engine(parsed)
    except (ArgumentError, ImportError) as error:
        raise Terminal(f"LAKEHOUSE_CRM_URL cannot be used: {error}") from None
    try:
        with engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection.execution_options(postgresql_readonly=True)
                connection.execute(sa.text("SET TIME ZONE 'UTC'"))
            yield connection
    except SQLAlchemyError as error:
        raise _explained(error, parsed) from None
    finally:
        engine.dispose()


def _engine(url: URL) -> sa.Engine:
    if url.get_backend_name() == "sqlite" and url.database and not url.database.startswith("file:"):
        # read-only: opened for writing, a file that is not there would be made
        url = url.set(database=f"file:{quote(url.database)}", query={"mode": "ro", "uri": "true"})
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    postgres = url.get_backend_name() == "postgresql"
    return sa.create_engine(url, connect_args={"connect_timeout": CONNECT_SECONDS} if postgres else {})


def _place(url: URL) -> str:
    """A URL as an error may show it: without the password, and without options, which can hold one too."""
    return url.set(query={}).render_as_string(hide_password=True)


def _explained(error: SQLAlchemyError, url: URL) -> Terminal | Retryable:
    """The driver's own words, first line; SQLAlchemy's text would quote statement and parameters."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
    said = (str(cause).splitlines() or [type(cause).__name__])[0]
    for hidden in (url.password, *url.query.values()):
        said = said.replace(str(hidden), "***") if hidden else said
    state = getattr(cause, "sqlstate", None) or ""
    # a refused login has no SQLSTATE in psycopg, only libpq's text
    refused = state.startswith(TERMINAL_STATES) or isinstance(error, ProgrammingError) or "FATAL:" in str(cause)
    starting = "starting up" in str(cause) or "shutting down" in str(cause) or "too many" in str(cause)
    if refused and not starting:
        return Terminal(f"the CRM at {_place(url)} refuses: {said}; check LAKEHOUSE_CRM_URL and {MAPPING}")
    return Retryable(f"the CRM at {_place(url)} does not answer: {said}")


def _described(connection: sa.Connection, spec: CrmTable, *, naive_is_utc: bool) -> dict[str, sa.Column[Any]]:
    """{our name: their column}, with the types that the database says.

    Raises:
        Terminal: the table or a column is not there, or a time is no time.
    """
    schema = spec.table.rpartition(".")[0] or None
    looked = sa.inspect(connection)
    try:
        types = {c["name"]: c["type"] for c in looked.get_columns(spec.name, schema=schema)}
    except NoSuchTableError:
        raise Terminal(
            f"the CRM at {_place(connection.engine.url)} has no table {spec.table!r}; check LAKEHOUSE_CRM_URL, and the names in "
            f"{MAPPING}"
        ) from None
    if missing := [c for c in spec.columns.values() if c not in types]:
        raise Terminal(f"the CRM's table {spec.table!r} has no column {missing[0]!r}; its names are in {MAPPING}")
    columns = {ours: sa.Column(theirs, types[theirs]) for ours, theirs in spec.columns.items()}
    sa.Table(spec.name, sa.MetaData(), *columns.values(), schema=schema)
    if connection.dialect.name != "sqlite":  # which has no types
        for column in (columns[n] for n in TIMES if n in columns):
            said = f"the CRM's {spec.table}.{column.name} is {column.type}"
            if not isinstance(column.type, sa.DateTime | sa.Date):
                raise Terminal(f"{said}, not a time; its names are in {MAPPING}")
            if not (_zoned(column) or naive_is_utc):
                raise Terminal(f"{said} and does not say its zone; if it is UTC, set times_without_zone_are_utc in {MAPPING}")
    return columns


def _zoned(column: sa.Column[Any]) -> bool:
    return bool(getattr(column.type, "timezone", False))


def _query(dialect: str, columns: Mapping[str, sa.Column[Any]], since: datetime | None) -> sa.Select[Any]:
    def chosen(name: str, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        if dialect == "sqlite" or name not in (*TIMES, "deleted"):
            return sa.cast(column, sa.String)
        if name in TIMES:  # what no driver can show, such as `infinity` or a year of five digits, is NULL
            first, last = (_bound(column, at) for at in SHOWABLE)
            return sa.case((column.between(first, last), column))
        return column

    query = sa.select(*(chosen(n, c).label(n) for n, c in columns.items()))
    if since is None:
        return query
    updated = columns["updated_at"]
    if dialect == "sqlite":  # text in any ISO-8601 spelling: compared as instants, to a second; NULL if it cannot be read
        when = sa.func.julianday(sa.cast(updated, sa.String))
        return query.where(sa.or_(when >= sa.func.julianday((since - timedelta(seconds=1)).isoformat()), when.is_(None)))
    return query.where(sa.or_(updated >= _bound(updated, since), updated.is_(None)))


def _bound(column: sa.Column[Any], at: datetime) -> datetime:
    return at if _zoned(column) else at.replace(tzinfo=None)


def _frame(dialect: str, columns: Mapping[str, sa.Column[Any]], rows: Sequence[Any]) -> pl.DataFrame:
    """A chunk of rows as columns, as the database gave them; times as MOMENT, or text where the database has no types."""
    values = zip(*rows, strict=True) if rows else ((),) * len(columns)
    kinds: dict[str, Any] = dict.fromkeys(columns, pl.String())
    if dialect != "sqlite":
        kinds |= {n: MOMENT if _zoned(columns[n]) else pl.Datetime("us") for n in TIMES if n in columns}
        kinds["deleted"] = None  # a flag or a time: as it is
    frame = pl.DataFrame([pl.Series(n, v, kinds[n]) for n, v in zip(columns, values, strict=True)])
    return frame.with_columns(pl.col(pl.Datetime("us")).dt.replace_time_zone("UTC"))


def _usable(spec: CrmTable, found: pl.DataFrame, *, naive_is_utc: bool) -> Read:
    """Tell the rows that can be used from those that cannot; of several rows with one key the last one counts."""
    problems: list[pl.Expr] = [pl.when(pl.col(c).is_null()).then(pl.lit(f"no_{c}")) for c in spec.key]
    moments = {}
    for name in (n for n in TIMES if n in spec.columns):
        said = pl.col(name)
        moments[name] = said
        problems.append(pl.when(said.is_null()).then(pl.lit(f"no_{name}")))
        if found.schema[name] == pl.String:
            said = said.str.strip_chars()
            zoned = said.str.contains(WITH_ZONE)
            if naive_is_utc:
                said = pl.when(zoned).then(said).otherwise(said + "Z")
            else:
                problems.append(pl.when(~zoned).then(pl.lit(f"{name}_without_zone")))
            moments[name] = instant(said)
            problems.append(pl.when(moments[name].is_null()).then(pl.lit(f"{name}_is_no_time")))
    moments.setdefault("effective_at", moments["updated_at"])
    deleted = flag(found.schema["deleted"]) if "deleted" in spec.columns else pl.lit(value=False)
    problems.append(pl.when(deleted.is_null()).then(pl.lit("deleted_is_no_flag")))
    judged = found.with_columns(pl.coalesce(problems).alias("reason"), deleted.alias("deleted"), **moments)
    rows = judged.filter(pl.col("reason").is_null()).select(pl.col(name).cast(kind) for name, kind in spec.schema.items())
    if rows.select(spec.key).is_duplicated().any():
        log.warning("the CRM's %s has several rows with one %s; the one written last counts", spec.table, ", ".join(spec.key))
        rows = rows.sort("updated_at", *rows.columns).unique(spec.key, keep="last", maintain_order=True)
    return Read(rows, judged.filter(pl.col("reason").is_not_null()).select(*spec.key, "reason"))


def instant(said: pl.Expr) -> pl.Expr:
    """ISO-8601 text with a zone (`2026-01-05T10:00:00.5+02:00`, `2026-01-05 10:00Z`) as MOMENT; NULL if it is none."""
    spelled = said.str.replace(" ", "T", literal=True)
    formats = ("%+", "%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M%#z")
    return pl.coalesce(spelled.str.to_datetime(f, time_unit="us", time_zone="UTC", strict=False) for f in formats)


def flag(kind: pl.DataType) -> pl.Expr:
    """The column `deleted` as a boolean: a flag or number as it says, a time says that it happened; NULL if it says neither."""
    said = pl.col("deleted")
    if kind == pl.String:
        spelled = said.str.strip_chars().str.to_lowercase()
        return (
            pl.when(said.is_null() | spelled.is_in(["", "0", "f", "false", "n", "no"]))
            .then(pl.lit(value=False))
            .when(spelled.is_in(["1", "t", "true", "y", "yes"]) | spelled.str.contains(r"^\d{4}-\d{2}-\d{2}"))
            .then(pl.lit(value=True))
        )
    if kind.is_temporal() or kind == pl.Null:
        return said.is_not_null()
    return (said if kind == pl.Boolean else said != 0).fill_null(value=False)
