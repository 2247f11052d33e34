"""Table declarations: `catalog/<layer>/<table>.yaml`, loaded strictly, and rendered to Iceberg schema, spec and order.

A declaration is the one place where a table's columns, keys, partitioning, retention, owner and checks are written.
pyiceberg drops unknown keys silently, so everything is checked here first; an error names file and column.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml
from pyiceberg.partitioning import PARTITION_FIELD_ID_START, PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table.sorting import SortField, SortOrder
from pyiceberg.transforms import IdentityTransform, parse_transform
from pyiceberg.types import IcebergType, ListType, NestedField, StructType

from lakehouse.errors import DeclarationError, UsageError

LAYERS = ("raw", "billing", "product", "marts", "ops")

Pii = Literal["none", "pseudonymous", "personal", "restricted"]
"""none: says nothing of a person; pseudonymous: an id of a person or account; personal: masked by default;
restricted: free payloads, e-mail and card data, readable by a named role only."""


class Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One column: Iceberg type string (or nested mapping), meaning, PII class."""

    name: str
    type: str | dict[str, Any]
    doc: str
    pii: Pii
    required: bool = False
    accepted: list[str] | None = None


class PartitionBy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One partition field: a column and an Iceberg transform, e.g. `day` or `bucket[8]`."""

    column: str
    transform: str = "identity"


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A blocking check: an SQL expression that must be true for every staged row (NULL counts as false)."""

    name: str
    sql: str


class Touch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """On which periods a changed row of an input falls (lakehouse/builds/by_period.py).

    at: those that these columns (dates or times) lie in; the input is then read for the touched periods alone.
    since, until: all from the first moment on which intervals differ (no until: from the first changed row), less `days_before`.
    via: SQL over `changed` and other inputs that gives times (`moment`): those that they lie in.
    """

    at: list[str] = []
    since: str | None = None
    until: str | None = None
    days_before: int = 0
    via: str | None = None


class Build(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the table is written, and which new rows set off the work.

    mode:
      append   rows at new positions (raw);
      insert   rows whose primary key is not there yet (an idempotent append);
      merge    all rows of the touched keys (`by`) are replaced by what the transform returns for them;
      history  (SCD2) of the touched keys only the intervals that change are replaced: see lakehouse.scd2.scd2_update;
      periods  the rows of the touched days or months are replaced: see lakehouse/builds/by_period.py;
      replace  the whole content is replaced;
      custom   the transform plans its own files (product.events).
    driver: the input table whose new rows set off the work; by: {column of this table: column of the driver}.
    first_by: (insert) of several copies of a key the lowest in these columns counts; else the one that is there. The first of
      them is the time of receipt.
    heads: a table of the last state of each object of the driver: to go on from without its versions (lakehouse/heads.py), or all
      that the transform reads. time: the driver's column (of an insert: the table's own) by which versions follow each other.
    links: a table of which objects belong to which, by which the rows of a few keys are found in tables that lie by their own
      objects (lakehouse/links.py).
    record: (insert) the columns of the key that name the record a row is made of; default: the key.
    own: (insert) SQL: true of the row that says what its record is about. A record has one; what is delivered under its name
      later with another key is left out, with all its rows, and goes to dead letters.
    conflict_on: a copy that contradicts the one that counts in these columns goes to dead letters.
    period, unit: (periods) the column of the table that says the day or month (its first day). touched_by: how each input's rows
      fall on periods; a change of an input that is not named touches all.
    """

    mode: Literal["append", "insert", "merge", "history", "periods", "replace", "custom"]
    driver: str | None = None
    by: dict[str, str] = {}
    where: str | None = None
    first_by: list[str] = []
    record: list[str] = []
    own: str | None = None
    conflict_on: list[str] = []
    heads: str | None = None
    links: str | None = None
    time: str | None = None
    period: str | None = None
    unit: Literal["day", "month"] = "day"
    touched_by: dict[str, Touch] = {}


class Awaited(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A raw table whose records a day waits for, and for how many hours after its end (lakehouse/completeness.py)."""

    clock: str
    after_hours: int


class Explained(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where figures of a row come from: rows of `source` for which `where` is true (lakehouse/explain.py).

    where, also, measures: SQL over `source AS entry` and other tables; `$column` is the row's own. also: {name: what is worked
    out of each of these rows}. measures: {column: what it is of all of them}; none where the rows are only what it was made from.
    """

    source: str
    why: str
    where: str
    also: dict[str, str] = {}
    measures: dict[str, str] = {}


class KeepSnapshots(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which snapshots of `main` stay when maintenance expires the others.

    The newest `at_least`, and those younger than `days` up to `at_most` in all. What a tag, a branch or a consistent cut refers
    to stays besides.
    """

    at_least: int
    at_most: int
    days: float


class Declaration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table, whole.

    row_group_rows: small groups let a few keys be found in a large sorted file by statistics. complete: what a day of the table
    waits for; its SQL is then given `$complete_until`, the last complete day.
    """

    table: str
    doc: str
    owner: str
    grain: str
    primary_key: list[str]
    build: Build
    columns: list[Column]
    partition: list[PartitionBy] = []
    sort: list[str] = []
    row_group_rows: int | None = None
    retention_days: int | None = None
    snapshots: KeepSnapshots | None = None
    freshness_minutes: int | None = None
    complete: list[Awaited] = []
    explain: list[Explained] = []
    checks: list[Check] = []
    path: str = ""

    @property
    def layer(self) -> str:
        """The namespace: raw, billing, product, marts or ops."""
        return self.table.partition(".")[0]

    @property
    def name(self) -> str:
        """The table's name without its layer."""
        return self.table.partition(".")[2]

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, in order."""
        return [c.name for c in self.columns]

    @property
    def keep_snapshots(self) -> KeepSnapshots:
        """As declared, or the default: few where writers append (a commit costs what it costs to copy the metadata, and what is
        read from these tables is found by offset), a week's elsewhere.
        """
        return self.snapshots or (KeepSnapshots(10, 30, 1) if self.build.mode == "append" else KeepSnapshots(20, 200, 7))

    def schema(self) -> Schema:
        """The Iceberg schema; field ids are given in order of declaration."""
        ids = itertools.count(1)
        top = [(next(ids), c) for c in self.columns]
        fields = [
            NestedField(
                field_id=i,
                name=c.name,
                field_type=_iceberg_type(c.type, ids),
                required=c.required or c.name in self.primary_key,
                doc=c.doc,
            )
            for i, c in top
        ]
        return Schema(*fields, identifier_field_ids=[i for i, c in top if c.name in self.primary_key])

    def partition_spec(self, schema: Schema) -> PartitionSpec:
        """The Iceberg partition spec over `schema`."""
        return PartitionSpec(
            *(
                PartitionField(
                    source_id=schema.find_field(p.column).field_id,
                    field_id=PARTITION_FIELD_ID_START + i,
                    transform=parse_transform(p.transform),
                    name=p.column if p.transform == "identity" else f"{p.column}_{p.transform.partition('[')[0]}",
                )
                for i, p in enumerate(self.partition)
            )
        )

    def sort_order(self, schema: Schema) -> SortOrder:
        """The Iceberg sort order over `schema` (ascending)."""
        return SortOrder(*(SortField(source_id=schema.find_field(c).field_id, transform=IdentityTransform()) for c in self.sort))


class _SharedColumns(msgspec.Struct, forbid_unknown_fields=True):
    columns: list[Column]


def _iceberg_type(spec: str | dict[str, Any], ids: Iterator[int]) -> IcebergType:
    """Build an Iceberg type from its name, or from Iceberg's JSON form without ids (list and struct)."""
    if isinstance(spec, str):
        # pyiceberg's own parser: `decimal(18, 2)`, `fixed[16]`, `timestamptz`, ...
        found = IcebergType.model_validate(spec)
        if found.minimum_format_version() > 2:  # Snowflake reads no v3 table
            raise ValueError(f"{spec} needs Iceberg v3")
        return found
    unknown = set(spec) - {"type", "element", "fields"}
    if unknown:
        raise ValueError(f"unknown key {sorted(unknown)} in a nested type")
    if spec.get("type") == "list":
        return ListType(element_id=next(ids), element=_iceberg_type(spec["element"], ids), element_required=True)
    if spec.get("type") == "struct":
        return StructType(
            *(
                NestedField(next(ids), f["name"], _iceberg_type(f["type"], ids), required=bool(f.get("required", False)))
                for f in spec["fields"]
            )
        )
    raise ValueError(f"unknown nested type {spec.get('type')!r}; use list or struct")


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that comes twice in one mapping: YAML forbids it, PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} comes twice", key.start_mark)
            seen.add(key.value)
        return dict(super().construct_mapping(node, deep))


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DeclarationError(f"{path}: not valid YAML: {error}") from None


def _parse_yaml(path: Path, content: str) -> Any:
    try:
        return yaml.load(content, _StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DeclarationError(f"{path}: not valid YAML{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise DeclarationError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None


def _expand(path: Path, content: Any, shared: dict[str, Column]) -> Any:
    """Replace `use: NAME` by the shared column of that name; what stands beside it overrides."""
    if not isinstance(content, dict) or not isinstance(content.get("columns"), list):
        raise DeclarationError(f"{path}: a declaration is a mapping with a list `columns`")
    columns = []
    for i, column in enumerate(content["columns"]):
        if not isinstance(column, dict):
            raise DeclarationError(f"{path}: columns[{i}] is not a mapping")
        if "use" in column:
            source = shared.get(str(column["use"]))
            if source is None:
                raise DeclarationError(f"{path}: column {column['use']!r} is not in columns.yaml")
            column = msgspec.to_builtins(source) | {k: v for k, v in column.items() if k != "use"}
        for missing in [k for k in ("name", "type", "doc", "pii") if k not in column]:
            what = "has no PII class (`pii:`)" if missing == "pii" else f"has no `{missing}:`"
            raise DeclarationError(f"{path}: column {column.get('name', f'#{i}')!r} {what}")
        columns.append(column)
    return content | {"columns": columns}


def _validate(path: Path, content: Any) -> Declaration:
    """Check one expanded declaration and everything that Iceberg will be given from it."""
    try:
        declared = msgspec.convert(content, Declaration)
    except msgspec.ValidationError as error:
        raise DeclarationError(f"{path}: {_name_column(str(error), content)}") from None
    declared = msgspec.structs.replace(declared, path=str(path))
    expected = f"{path.parent.name}.{path.stem}"
    if declared.table != expected or declared.layer not in LAYERS:
        raise DeclarationError(f"{path}: table is {declared.table!r}, but the file's place says {expected!r}")
    names = declared.column_names
    if doubled := sorted({n for n in names if names.count(n) > 1}):
        raise DeclarationError(f"{path}: column {doubled[0]!r} is declared twice")
    if not declared.primary_key:
        raise DeclarationError(f"{path}: primary_key is empty")
    for role, used in {
        "primary_key": declared.primary_key,
        "sort": declared.sort,
        "partition": [p.column for p in declared.partition],
        "build.by": list(declared.build.by),
        "build.first_by": declared.build.first_by,
        "build.record": declared.build.record,
        "build.conflict_on": declared.build.conflict_on,
        "build.period": [declared.build.period] if declared.build.period else [],
        "explain.measures": [m for e in declared.explain for m in e.measures],
    }.items():
        for column in used:
            if column not in names:
                close = difflib.get_close_matches(column, names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise DeclarationError(f"{path}: {role} names column {column!r}, which is not declared{hint}")
    for c in declared.columns:
        try:
            _iceberg_type(c.type, itertools.count(1))
        except Exception:  # pydantic, KeyError, ValueError: each means the same to the reader
            raise DeclarationError(f"{path}: column {c.name!r}: unknown type {c.type!r}") from None
    schema = declared.schema()
    for part in declared.partition:
        try:
            transform = parse_transform(part.transform)
            if not transform.can_transform(schema.find_type(part.column)):
                raise ValueError(part.transform)
        except Exception:
            raise DeclarationError(
                f"{path}: partition on {part.column!r}: transform {part.transform!r} is unknown or does not fit its type"
            ) from None
    keep = declared.keep_snapshots
    if not (1 <= keep.at_least <= keep.at_most and keep.days >= 0):
        raise DeclarationError(f"{path}: snapshots: needs 1 <= at_least <= at_most, and days of 0 or more")
    fields = [f.name for f in declared.partition_spec(schema).fields if not isinstance(f.transform, IdentityTransform)]
    if clash := [f for f in fields if f in names or fields.count(f) > 1]:
        raise DeclarationError(f"{path}: partition field {clash[0]!r} is there twice, or is the name of a column")
    if declared.build.mode == "merge":
        if not (declared.build.driver and declared.build.by):
            raise DeclarationError(f"{path}: build.mode merge needs `driver` and `by`")
        # the rows of a key are looked for in its own partition alone: see lakehouse/builds/merges.py
        if not declared.partition or declared.partition[0].column not in declared.build.by:
            raise DeclarationError(f"{path}: build.mode merge needs a first partition column that is one of `by`")
    if declared.build.mode == "periods":
        if not declared.build.period or [p.column for p in declared.partition[:1]] != [declared.build.period]:
            raise DeclarationError(f"{path}: build.mode periods needs `period`, and it must be the first partition column")
        for table, touch in declared.build.touched_by.items():
            if sum(map(bool, (touch.at, touch.since, touch.via))) != 1 or (touch.until and not touch.since):
                raise DeclarationError(f"{path}: build.touched_by {table}: give one of `at`, `since` (with `until`) and `via`")
    return declared


def _name_column(message: str, content: Any) -> str:
    """Turn msgspec's `$.columns[3]` into the column's name."""
    for i, column in enumerate(content["columns"]):
        message = message.replace(f"`$.columns[{i}]`", f"column {column.get('name')!r}")
        message = message.replace(f"`$.columns[{i}].", f"column {column.get('name')!r} at `")
    return message


def load_declarations(catalog_dir: Path) -> dict[str, Declaration]:
    """Load and check every declaration below `catalog_dir`.

    Returns:
        {"layer.table": Declaration}, in the order of LAYERS, then by name.

    Raises:
        DeclarationError: naming the file and the column, for an unknown key, an unknown type, a missing PII class, a key
            column that is not declared, a table whose file is in the wrong place.
    """
    if not catalog_dir.is_dir():
        raise UsageError(f"LAKEHOUSE_CATALOG_DIR: {catalog_dir} is not a folder")
    paths = [path for layer in LAYERS for path in sorted((catalog_dir / layer).glob("*.yaml"))]
    shared_path = catalog_dir / "columns.yaml"
    shared = [shared_path] if shared_path.is_file() else []
    return dict(_parsed(catalog_dir, tuple((p, _read_text(p)) for p in (*shared, *paths))))


@lru_cache(maxsize=8)
def _parsed(catalog_dir: Path, files: tuple[tuple[Path, str], ...]) -> dict[str, Declaration]:
    """The declarations in these files: the same texts are parsed once a process (0.1 s), not for each lake that is opened."""
    shared_path = catalog_dir / "columns.yaml"
    shared: dict[str, Column] = {}
    texts = dict(files)
    if shared_path in texts:
        content = _expand(shared_path, _parse_yaml(shared_path, texts.pop(shared_path)), {})
        try:
            columns = msgspec.convert(content, _SharedColumns).columns
        except msgspec.ValidationError as error:
            raise DeclarationError(f"{shared_path}: {_name_column(str(error), content)}") from None
        shared = {c.name: c for c in columns}
        if len(shared) < len(columns):
            doubled = next(c.name for c in columns if sum(c.name == other.name for other in columns) > 1)
            raise DeclarationError(f"{shared_path}: column {doubled!r} is declared twice")
    tables = {}
    for path, text in texts.items():
        declared = _validate(path, _expand(path, _parse_yaml(path, text), shared))
        tables[declared.table] = declared
    if not tables:
        raise DeclarationError(f"{catalog_dir}: no declarations found")
    for declared in tables.values():
        if declared.build.driver and declared.build.driver not in tables:
            raise DeclarationError(f"{declared.path}: build.driver {declared.build.driver!r} is not a declared table")
        if declared.build.links and declared.build.links not in tables:
            raise DeclarationError(f"{declared.path}: build.links {declared.build.links!r} is not a declared table")
        for touching in declared.build.touched_by:
            if touching not in tables:
                raise DeclarationError(f"{declared.path}: build.touched_by {touching!r} is not a declared table")
        for explained in declared.explain:
            if explained.source not in tables:
                raise DeclarationError(f"{declared.path}: explain.source {explained.source!r} is not a declared table")
    return tables


@cache
def load_reference(catalog_dir: Path, name: str) -> Any:
    """Reference data `catalog/reference/<name>.yaml` (plans, entitlements, Stripe paths), as plain Python values."""
    path = catalog_dir / "reference" / f"{name}.yaml"
    if not path.is_file():
        raise DeclarationError(f"{path}: no such reference data")
    return _parse_yaml(path, _read_text(path))


def get_table(tables: dict[str, Declaration], name: str) -> Declaration:
    """The declaration of `name`.

    Raises:
        UsageError: no such table; the message names the closest one.
    """
    if name in tables:
        return tables[name]
    close = difflib.get_close_matches(name, tables, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else "see: lakehouse status"
    raise UsageError(f"no table {name!r}; {hint}")
