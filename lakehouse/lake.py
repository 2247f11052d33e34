"""The lake: declared tables in an Iceberg catalog. Opening, creating, evolving and finding snapshots; no commit of data."""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException, NoSuchTableError, TableAlreadyExistsError, ValidationError
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.types import IcebergType, ListType, NestedField, StructType

from lakehouse.catalogs import open_catalog
from lakehouse.declarations import Declaration, get_table, load_declarations
from lakehouse.errors import Retryable, Terminal, UsageError
from lakehouse.outages import reaching, without_password
from lakehouse.positions import Vector, load_vector, refuse_rolled_back, vector_of
from lakehouse.settings import ROOT, Settings

TABLE_PROPERTIES = {
    "format-version": "2",  # Snowflake reads v2 only
    # Our own loop retries (lakehouse/publish.py); the library's would drop the snapshot requirement and rebase.
    "commit.retry.num-retries": "0",
    "commit.manifest-merge.enabled": "true",
    "commit.manifest.min-count-to-merge": "20",  # planning reads every manifest: keep them few
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "100",
    "write.parquet.compression-codec": "zstd",
    "write.parquet.compression-level": "1",
    "write.target-file-size-bytes": str(256 * 2**20),
}


SCHEMA_ATTEMPTS = 20

IGNORED = "ignored"
"""In the summary of a snapshot: the records left out by design up to it."""


def code_version() -> str:
    """The version of the code that runs: the git commit, with `+` if the tree is dirty, or the distribution's version."""
    if version := os.environ.get("STREAMFORGE_CODE_VERSION"):
        return version
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return head.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        from importlib.metadata import version as distribution_version

        return distribution_version("streamforge-lakehouse")


@dataclass(frozen=True)
class Run:
    """What every commit of one run records: its id and the code that ran."""

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    code_version: str = field(default_factory=code_version)


@dataclass(frozen=True)
class Lake:
    """The declared tables and the Iceberg catalog they live in."""

    settings: Settings
    declarations: Mapping[str, Declaration]
    run: Run

    @cached_property
    def catalog(self) -> Catalog:
        """The Iceberg catalog, connected on first use."""
        with self._asking("connecting"):
            return open_catalog(self.settings)

    @cached_property
    def kept(self) -> dict[str, object]:
        """What one table's run leaves for the next of the same process; whoever takes something from it checks that it fits."""
        return {}

    def _asking(self, what: str) -> AbstractContextManager[None]:
        """What goes wrong with the Iceberg catalog inside is Retryable or Terminal, and says where it is."""
        return reaching(f"the Iceberg catalog at {without_password(self.settings.iceberg_catalog_uri)}: {what}")

    def declaration(self, name: str) -> Declaration:
        """The declaration of a table; UsageError if there is none."""
        return get_table(dict(self.declarations), name)

    def exists(self, name: str) -> bool:
        """Whether the declared table has been created in the Iceberg catalog."""
        self.declaration(name)
        with self._asking(f"looking for {name}"):
            return self.catalog.table_exists(name)

    def load(self, name: str) -> Table:
        """The table as it stands now.

        Raises:
            UsageError: not declared, or declared and not created yet.
        """
        table = self.find(name)
        if table is None:
            raise UsageError(f"{name} is declared but holds nothing yet; fill it: lakehouse demo, or lakehouse run")
        return table

    def find(self, name: str) -> Table | None:
        """The table as it stands now; None if it has not been created. One request, where `exists` and `load` are two."""
        self.declaration(name)
        try:
            with self._asking(f"loading {name}"):
                return self.catalog.load_table(name)
        except NoSuchTableError:
            return None

    def open_for_write(self, name: str) -> Table:
        """The table, created from its declaration if need be and given the columns newly declared.

        Raises:
            RolledBack: its positions name a snapshot newer than the current one.
            Terminal: the declaration changed in a way that data already written does not allow.
        """
        declared = self.declaration(name)
        with self._asking(f"opening {name}"):
            try:
                table = self.catalog.load_table(name)
            except NoSuchTableError:
                table = self._create(declared)
            _evolve(declared, table)
        refuse_rolled_back(name, table.metadata)
        return table

    def _create(self, declared: Declaration) -> Table:
        self.catalog.create_namespace_if_not_exists(declared.layer)
        schema = declared.schema()
        try:
            return self.catalog.create_table(
                declared.table,
                schema=schema,
                partition_spec=declared.partition_spec(schema),
                sort_order=declared.sort_order(schema),
                properties=TABLE_PROPERTIES
                | ({"write.parquet.row-group-limit": str(declared.row_group_rows)} if declared.row_group_rows else {})
                | {"comment": declared.doc, "owner": declared.owner},
            )
        except TableAlreadyExistsError:  # another process was quicker
            return self.catalog.load_table(declared.table)

    def existing(self) -> Iterator[str]:
        """Names of the declared tables that exist in the Iceberg catalog, in the order of the declarations."""
        return (name for name in self.declarations if self.exists(name))

    def vector(self, name: str) -> dict[tuple[str, int], int]:
        """How far `name` has consumed its sources; empty if it does not exist. Raw tables: what their writer has committed."""
        table = self.find(name)
        return vector_of(table.metadata, name) if table else {}


def _shape(kind: IcebergType) -> object:
    """A type without the field ids of its parts, which a declaration cannot know."""
    if isinstance(kind, ListType):
        return ("list", _shape(kind.element_type))
    if isinstance(kind, StructType):
        return ("struct", *((f.name, _shape(f.field_type)) for f in kind.fields))
    return str(kind)


def _differences(declared: Declaration, table: Table) -> tuple[list[NestedField], list[NestedField], list[str]]:
    """The columns that the table lacks, those declared with another type, and those that are no longer required.

    Raises:
        Terminal: a column is no longer declared, a new one is required, or the partitioning is another: data already
            written would contradict it.
    """
    schema = declared.schema()
    wanted, present = {f.name: f for f in schema.fields}, {f.name: f for f in table.schema().fields}
    where = f"{declared.path}: {declared.table}"
    if gone := sorted(present.keys() - wanted.keys()):
        raise Terminal(f"{where} has a column {gone[0]!r} that is no longer declared; columns are never dropped")
    new = [f for n, f in wanted.items() if n not in present]
    if required := [f.name for f in new if f.required]:
        raise Terminal(f"{where}: new column {required[0]!r} cannot be required: rows already written do not have it")
    # the table may have moved on from the declared partitioning (Iceberg keeps its specs); it must have come from it
    spec = [(schema.find_field(p.source_id).name, str(p.transform)) for p in declared.partition_spec(schema).fields]
    specs = [[(table.schema().find_field(p.source_id).name, str(p.transform)) for p in s.fields] for s in table.specs().values()]
    if spec not in specs:
        raise Terminal(f"{where} is partitioned by {specs[-1]}, and declared to be by {spec}; build it anew under another name")
    there = [(f, present[n]) for n, f in wanted.items() if n in present]
    changed = [f for f, old in there if _shape(f.field_type) != _shape(old.field_type)]
    return new, changed, [f.name for f, old in there if old.required and not f.required]


def _evolve(declared: Declaration, table: Table) -> None:
    """Add new columns, widen types, let a column be NULL: as a commit of its own before the data, however many try at once."""
    for attempt in range(SCHEMA_ATTEMPTS):
        new, changed, optional = _differences(declared, table)
        if not (new or changed or optional):
            return
        try:
            with table.update_schema() as update:
                for column in new:
                    update.add_column(column.name, column.field_type, doc=column.doc)
                for column in changed:
                    update.update_column(column.name, column.field_type)
                for name in optional:
                    update.make_column_optional(name)
        except ValidationError as error:  # int to long, float to double, more digits: anything else would alter what is written
            raise Terminal(f"{declared.path}: {declared.table}: {error}") from None
        except CommitFailedException:  # pyiceberg does not retry a schema change
            time.sleep(0.05 * (attempt + 1))
            table.refresh()
        else:
            return
    raise Retryable(f"{declared.table}: other commits came before the schema change {SCHEMA_ATTEMPTS} times; run it again")


def open_lake(settings: Settings, run: Run | None = None) -> Lake:
    """Load the declarations and make a lake; the Iceberg catalog is connected on first use."""
    return Lake(settings, load_declarations(settings.catalog_dir), run or Run())


def snapshot_vector(snapshot: Snapshot, consumer: str) -> dict[tuple[str, int], int]:
    """The vector that `consumer` had when the snapshot was made, from its summary."""
    summary = snapshot.summary.additional_properties if snapshot.summary else {}
    return load_vector(json.loads(summary.get("lakehouse.positions", "{}")).get(consumer, {}))


def snapshot_inputs(snapshot: Snapshot) -> dict[str, int]:
    """The snapshot ids of the inputs the snapshot was made from: {"layer.table": id}."""
    summary = snapshot.summary.additional_properties if snapshot.summary else {}
    return {k: int(v) for k, v in json.loads(summary.get("lakehouse.inputs", "{}")).items()}


def history(table: Table) -> list[Snapshot]:
    """The snapshots of the main branch, newest first. Snapshots of other branches and rolled-back ones are not in it."""
    found = []
    snapshot = table.current_snapshot()
    while snapshot is not None:
        found.append(snapshot)
        snapshot = table.snapshot_by_id(snapshot.parent_snapshot_id) if snapshot.parent_snapshot_id is not None else None
    return found


def snapshot_at(table: Table, name: str, as_of: datetime | int) -> Snapshot | None:
    """The snapshot with that id, or the one that was current at that time; None if the table held nothing then.

    Raises:
        UsageError: no snapshot has this id.
    """
    if isinstance(as_of, int):
        snapshot = table.snapshot_by_id(as_of)
        if snapshot is None:
            raise UsageError(f"{name} has no snapshot {as_of}; see: lakehouse show {name}")
        return snapshot
    return table.snapshot_as_of_timestamp(int(as_of.timestamp() * 1000))


def ignored_records(table: Table) -> int:
    """How many records the transform has left out by design so far (kinds that are not kept); a rollback takes them back."""
    said = (s.summary.additional_properties.get(f"lakehouse.{IGNORED}") for s in history(table) if s.summary)
    return int(next((count for count in said if count is not None), 0))


def newest_within(table: Table, consumer: str, cut: Vector) -> Snapshot | None:
    """The newest snapshot whose vector does not pass `cut` in any of the cut's partitions.

    A snapshot that another tool made says nothing of positions, so it cannot be chosen.
    """
    for snapshot in history(table):
        if snapshot.summary is None or "lakehouse.positions" not in snapshot.summary.additional_properties:
            continue
        reached = snapshot_vector(snapshot, consumer)
        if all(reached.get(key, 0) <= offset for key, offset in cut.items()):
            return snapshot
    return None
