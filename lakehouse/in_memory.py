"""Tables as a pure function: Arrow in, Arrow out, without an Iceberg catalog or a broker.

The same transforms that the jobs run. A job adds only reading what is new, checks and commits; tests, a notebook and a re-run of
history call this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any

import pyarrow as pa

from lakehouse.declarations import load_declarations
from lakehouse.errors import UsageError
from lakehouse.queries import bind_arrow, connect
from lakehouse.settings import Settings
from lakehouse.transforms import Built, Inputs, load_transforms

PARAMETERS = {"complete_until": date(9999, 1, 1)}
"""What is known of tables that are given whole: every day is complete."""


def build_tables(
    settings: Settings, given: Mapping[str, pa.Table], wanted: Iterable[str], parameters: Mapping[str, Any] = PARAMETERS
) -> dict[str, Built]:
    """Build tables from tables that are given; what lies between is built on the way, each once.

    Args:
        settings: where declarations and transforms are, and what DuckDB may use.
        given: {"layer.table": rows}, with the columns that the transforms read; never changed.
        wanted: the tables to build, e.g. "billing.subscriptions".
        parameters: what the SQL files name besides tables (`$complete_until`).

    Returns:
        {"layer.table": rows and rejected records} of the tables wanted. Whole tables: what the jobs hold after they have seen
        all of `given`, in any order and any batches.

    Raises:
        UsageError: a table is needed that is neither given nor made by a transform.
        Terminal: a transform refuses its input.
    """
    transforms = load_transforms(settings.transforms_dir, load_declarations(settings.catalog_dir))
    built: dict[str, Built] = {}

    def rows_of(name: str) -> pa.Table:
        if name in given:
            return given[name]
        if name not in built:
            if name not in transforms:
                raise UsageError(f"{name} is not given, and no transform makes it; give its rows")
            with connect(settings) as connection:
                for source in transforms[name].inputs:
                    bind_arrow(connection, source, rows_of(source))
                built[name] = transforms[name].build(Inputs(connection, settings.catalog_dir, parameters))
        return built[name].rows

    for name in (wanted := list(wanted)):
        rows_of(name)
    return {name: built[name] for name in wanted if name in built}
