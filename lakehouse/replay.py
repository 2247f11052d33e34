"""Replay: give dead letters to their transform again, after it was fixed. What it can use now lands; the rest stays a letter.

A record is read from raw by its coordinates, so nothing is fetched, produced or received again. It is known from the replay on
(`taken_up_at` of its letter), not from its receipt: what was known before stays as it was. Its rows land through the same
transform and the same commit path; then each table below takes up the same coordinates, because they lie under positions that
it has passed. Letters are closed last: a replay that dies half way is simply run again, and what had landed is found to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import polars as pl
import pyarrow as pa

from lakehouse.coordinates import COORDINATES, coordinates_sql
from lakehouse.dead_letters import open_letters, settle, take_up
from lakehouse.errors import UsageError
from lakehouse.lake import Lake
from lakehouse.queries import connect, fetch
from lakehouse.runner import run, take_up_again
from lakehouse.transforms import Transform, load_transforms, upstream


@dataclass(frozen=True)
class Replayed:
    """What a replay did. gone: letters whose record raw no longer holds (retention); refused: {reason: letters} that stay open.

    tables: those whose rows were looked at again, in order.
    """

    table: str
    letters: int = 0
    resolved: int = 0
    gone: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)


def replay(
    lake: Lake,
    name: str,
    reason: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Replayed:
    """Replay the open dead letters of one table; `reason` and the half-open range of `received_at` choose among them.

    Raises:
        UsageError: the table is not one that reads raw records. Retryable: see lakehouse.runner.take_up_again.
    """
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    source = _raw_driver(lake, name, transforms)
    letters = open_letters(lake, name, reason, since, until)
    if letters.is_empty():
        return Replayed(name)
    below = _below(lake, name, transforms)
    say = on_step or (lambda *_: None)
    say("catching up", 0, letters.height)
    run(lake, [name, *below])  # a table that is behind would pin an input as it was before the replay
    resolved = gone = done = 0
    refused: dict[str, int] = {}
    for part in letters.sort(COORDINATES).iter_slices(lake.settings.batch_rows):
        present = _present(lake, source, part.select(COORDINATES).to_arrow())
        gone += part.height - present.num_rows
        if present.num_rows:
            take_up(lake, name, pl.DataFrame(present), datetime.now(UTC))
            still = _replay_part(lake, name, below, present, transforms)
            for why, count in still.group_by("reason").len().iter_rows():
                refused[why] = refused.get(why, 0) + count
            settle(lake, name, pl.DataFrame(present), still, datetime.now(UTC))
            resolved += present.num_rows - still.height
        done += part.height
        say(name, done, letters.height)
    return Replayed(name, letters.height, resolved, gone, dict(sorted(refused.items())), [name, *below] if resolved else [])


def _replay_part(lake: Lake, name: str, below: list[str], records: pa.Table, transforms: Mapping[str, Transform]) -> pl.DataFrame:
    """Take records up again in the table, then in those below it; returns what the transform still refuses."""
    _, refused = take_up_again(lake, name, records, transforms)
    none = pl.DataFrame(records).clear().with_columns(reason=pl.lit(None, pl.String), detail=pl.lit(None, pl.String))
    told = [pl.DataFrame(r).select(none.columns) for r in refused]
    still = pl.concat([none, *told], how="vertical_relaxed").unique(COORDINATES, keep="first", maintain_order=True)
    if still.height < records.num_rows:
        for other in below:
            take_up_again(lake, other, records, transforms)
    return still


def _raw_driver(lake: Lake, name: str, transforms: Mapping[str, Transform]) -> str:
    """The raw table whose records the table is made from, one by one."""
    driver = lake.declaration(name).build.driver
    if name not in transforms or driver is None or not driver.startswith("raw."):
        able = [n for n in transforms if (lake.declaration(n).build.driver or "").startswith("raw.")]
        raise UsageError(f"{name} takes no records from raw, so it has no dead letters; tables that do: {', '.join(able)}")
    return driver


def _below(lake: Lake, name: str, transforms: Mapping[str, Transform]) -> list[str]:
    """The tables made from this one, directly or not, that have been built; each after its inputs."""
    found: list[str] = []
    for other, transform in transforms.items():
        if {name, *found} & set(upstream(lake.declaration(other), transform)) and lake.exists(other):
            found.append(other)
    return found


def _present(lake: Lake, source: str, coordinates: pa.Table) -> pa.Table:
    """Those of the coordinates that the raw table still holds."""
    table = lake.load(source)
    current = table.current_snapshot()
    with connect(lake.settings) as connection:
        rows = coordinates_sql(connection, table, current.snapshot_id if current else None, coordinates)
        columns = ", ".join(f'"{c}"' for c in COORDINATES)
        return fetch(connection, f"SELECT {columns} FROM {rows} ORDER BY ALL")
