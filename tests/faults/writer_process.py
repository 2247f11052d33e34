"""What the processes of test_processes.py run: writers that append offsets, and may be shot at any Python call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from records import RAW, TOPIC, append_change, settings_of

from lakehouse.commit import commit
from lakehouse.errors import Fenced
from lakehouse.lake import Run, open_lake
from lakehouse.positions import vector_of
from tests.dying import die_at


@dataclass(frozen=True)
class Place:
    """Where a process finds the lake: its LAKEHOUSE_* variables, and the declarations."""

    environment: Mapping[str, str]
    declared: Path


def write_until(place: Place, run_id: str, partition: int, end: int, batch: int, die_at_call: int | None = None) -> None:
    """Append batches from the table's position on until it stands at `end`; a writer that is fenced starts again from there.

    die_at_call: SIGKILL at the so-manieth call of a Python or C function, counted from the first batch on.
    """
    lake = open_lake(settings_of(place.environment, catalog_dir=place.declared), Run(run_id, "test"))
    table = lake.open_for_write(RAW)
    if die_at_call is not None:
        die_at(die_at_call)
    while (start := vector_of(table.metadata, RAW).get((TOPIC, partition), 0)) < end:
        try:
            commit(table, lake.run, append_change(lake, table, partition, start, min(start + batch, end)))
        except Fenced:
            table.refresh()
