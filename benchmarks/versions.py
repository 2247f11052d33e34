"""Event versions laid down as if they had been received, webhooks delivered after them, and what a batch of them takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from pyiceberg.manifest import DataFile
from pyiceberg.typedef import Record

from lakehouse.append import append_rows
from lakehouse.commit import Change, commit
from lakehouse.lake import Lake
from lakehouse.maintenance.compact import merge_files
from lakehouse.runner import Report, run
from lakehouse.staging import stage

CHUNK = 1_000_000
TOPIC = "stripe"
END = datetime(2026, 1, 1, tzinfo=UTC)
"""What is laid down happened before, what is delivered in the two minutes after."""


def lay_down(lake: Lake, sql: str, versions: int, known: dict[str, Any], say: Callable[[str], None]) -> None:
    """Commit that many versions to billing.event_versions as if they had been received, and raw's positions with them.

    sql: the columns of billing.event_versions for the numbers n in [$first, $last), with `$topic` and what is `known`. The files
    are as maintenance leaves them: an object's versions lie side by side.
    """
    append_rows(lake, "raw.stripe_events", _raw([]), {}, {(TOPIC, 0): versions}, {TOPIC: "bench"})
    name = "billing.event_versions"
    table, declared = lake.open_for_write(name), lake.declaration(name)
    files: list[DataFile] = []
    for first in range(0, versions, CHUNK):
        say(f"laying down {first:,} of {versions:,} versions")
        with duckdb.connect(config={"threads": 2}) as connection:
            connection.execute("SET TimeZone = 'UTC'")
            of_chunk = known | {"topic": TOPIC, "first": first, "last": min(first + CHUNK, versions)}
            rows = connection.execute(sql, of_chunk).to_arrow_table()
        files += stage(table, declared, rows)
    say("compacting them")
    files = [merged for part in _of_partitions(files) for merged in merge_files(lake, declared, table, part)]
    commit(table, lake.run, Change(name, {(TOPIC, 0): 0}, {(TOPIC, 0): versions}, add=files))


def _of_partitions(files: list[DataFile]) -> list[list[DataFile]]:
    """The files of each partition."""
    found: dict[Record, list[DataFile]] = {}
    for file in files:
        found.setdefault(file.partition, []).append(file)
    return list(found.values())


def deliver(lake: Lake, batch: Sequence[bytes], first: int) -> None:
    """Commit webhooks to raw from that offset on, received five minutes after the END."""
    end = first + len(batch)
    append_rows(lake, "raw.stripe_events", _raw(batch, first), {(TOPIC, 0): first}, {(TOPIC, 0): end}, {TOPIC: "bench"})


def _raw(bodies: Sequence[bytes], first: int = 0) -> pa.Table:
    n = len(bodies)
    names = ["topic", "partition", "offset", "payload", "received_at", "source"]
    kinds = [pa.string(), pa.int32(), pa.int64(), pa.binary(), pa.timestamp("us", "UTC"), pa.string()]
    received = datetime.fromtimestamp(END.timestamp() + 300, UTC)
    columns = [[TOPIC] * n, [0] * n, list(range(first, first + n)), list(bodies), [received] * n, ["webhook"] * n]
    return pa.table([pa.array(c, k) for c, k in zip(columns, kinds, strict=True)], names=names)


@dataclass(frozen=True)
class Taken:
    """What it took to bring tables up to date: of the process, so nothing else may run in it."""

    seconds: float
    cpu_seconds: float
    mb: float
    reports: dict[str, Report]
    parts: dict[str, str] = field(default_factory=dict)
    """Of each table seconds, MB and rows, as text."""


def taken_up(lake: Lake, tables: Sequence[str]) -> Taken:
    """Run the tables, and say what it took."""
    parts: dict[str, str] = {}
    before = last = _moved()
    cpu, started = time.process_time(), time.monotonic()

    def note(report: Report) -> None:
        nonlocal last
        parts[report.table] = f"{report.seconds:.2f} s, {(_moved() - last) / 1e6:.1f} MB, {report.rows} rows"
        last = _moved()

    reports = {r.table: r for r in run(lake, tables, note)}
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    return Taken(seconds, cpu, (_moved() - before) / 1e6, reports, parts)


def _moved() -> int:
    """Bytes that this process has read and written through system calls."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text("ascii").splitlines())
    return int(found["rchar"]) + int(found["wchar"])
