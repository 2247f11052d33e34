"""Transforms as files: one `.sql` or one `.py` a table, at `transforms/<layer>/<table>`; their inputs read from the code."""

from __future__ import annotations

import graphlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import duckdb
import pyarrow as pa

from lakehouse.declarations import Declaration, load_reference
from lakehouse.errors import DeclarationError
from lakehouse.queries import REFERENCE, bind_reference, fetch, parameters_of, tables_read


@dataclass(frozen=True)
class Inputs:
    """What a transform is given: its inputs as relations in `connection`, restricted to what it has to work on."""

    connection: duckdb.DuckDBPyConnection
    catalog_dir: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What the machine knows and no table says, e.g. `complete_until`; the SQL file of a table takes of it what it names."""

    def sql(self, text: str, **parameters: Any) -> pa.Table:
        """Run SQL over the inputs (by their table names) and `reference.NAME`."""
        if f"{REFERENCE}." in text.lower():
            bind_reference(self.connection, self.catalog_dir, tables_read(text))
        return fetch(self.connection, text, parameters)

    def reference(self, name: str) -> Any:
        """Reference data, `catalog/reference/<name>.yaml`."""
        return load_reference(self.catalog_dir, name)


@dataclass(frozen=True)
class Built:
    """What a transform returns: the rows of its table, the input records it could not use, and how many it left out by design."""

    rows: pa.Table
    rejected: pa.Table | None = None
    ignored: int = 0


@dataclass(frozen=True)
class Transform:
    """The code of one table: its path, the tables it reads, and either SQL text (with the parameters it names) or a module."""

    path: Path
    inputs: tuple[str, ...]
    sql: str | None = None
    module: ModuleType | None = None
    parameters: tuple[str, ...] = ()

    def build(self, inputs: Inputs) -> Built:
        """Run the transform: the SQL file, or the module's `build(inputs)`."""
        if self.sql is not None:
            return Built(inputs.sql(self.sql, **{p: inputs.parameters[p] for p in self.parameters}))
        result = self.module.build(inputs)  # type: ignore[union-attr]
        return result if isinstance(result, Built) else Built(result)


@cache
def _load_module(path: Path) -> ModuleType:
    name = f"transforms.{path.parent.name}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_transform(transforms_dir: Path, declared: Declaration) -> Transform | None:
    """The transform of a table; None for tables that writers or the machine fill (raw, ops).

    Raises:
        DeclarationError: no code, or two files, for a table that needs one.
    """
    if declared.layer in ("raw", "ops"):
        return None
    stem = transforms_dir / declared.layer / declared.name
    found = [p for p in (stem.with_suffix(".sql"), stem.with_suffix(".py")) if p.is_file()]
    if len(found) != 1:
        raise DeclarationError(f"{declared.path}: {declared.table} needs one transform, {stem}.sql or .py; found {len(found)}")
    path = found[0]
    if path.suffix == ".sql":
        sql = path.read_text("utf-8")
        return Transform(
            path, tuple(t for t in tables_read(sql) if not t.startswith(REFERENCE)), sql=sql, parameters=parameters_of(sql)
        )
    module = _load_module(path)
    return Transform(path, tuple(module.INPUTS), module=module)


def load_transforms(transforms_dir: Path, declarations: Mapping[str, Declaration]) -> dict[str, Transform]:
    """All transforms, in an order in which each comes after its inputs."""
    loaded = {name: t for name, d in declarations.items() if (t := load_transform(transforms_dir, d))}
    for transform in loaded.values():
        for table in transform.inputs:
            if table not in declarations:
                raise DeclarationError(f"{transform.path}: reads {table!r}, which is not declared")
    edges = {name: set(comes_after(declarations[name], t)) & set(loaded) for name, t in loaded.items()}
    return {name: loaded[name] for name in graphlib.TopologicalSorter(edges).static_order()}


def upstream(declared: Declaration, transform: Transform) -> tuple[str, ...]:
    """The tables that `declared` is made from: what its code reads, and its driver."""
    driver = (declared.build.driver,) if declared.build.driver else ()
    return tuple(dict.fromkeys((*driver, *transform.inputs)))


def comes_after(declared: Declaration, transform: Transform) -> tuple[str, ...]:
    """The tables that are brought up to date before `declared`: what it is made from, and the links by which that is found."""
    links = (declared.build.links,) if declared.build.links else ()
    return tuple(dict.fromkeys((*upstream(declared, transform), *links)))


def with_inputs(names: Iterable[str], declarations: Mapping[str, Declaration], transforms: Mapping[str, Transform]) -> list[str]:
    """The tables and all that they are made from by transforms, directly or not, in order; `transforms` in theirs."""
    wanted = set(names)
    for name in reversed(list(transforms)):
        wanted |= set(comes_after(declarations[name], transforms[name])) if name in wanted else set()
    return [name for name in transforms if name in wanted]
