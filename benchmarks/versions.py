"""What the benchmarks of billing share: versions laid down as if they had been received, webhooks, and what a batch takes."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from pyiceberg.manifest import DataFile
from pyiceberg.typedef import Record

from lakehouse.append import append_rows
from lakehouse.commit import Change, commit
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.maintenance.compact import merge_files
from lakehouse.runner import Report, run
from lakehouse.settings import Settings
from lakehouse.staging import stage

CHUNK = 1_000_000
TOPIC = "stripe"
END = datetime(2026, 1, 1, tzinfo=UTC)
"""What is laid down happened before, what is delivered in the two minutes after."""


Say = Callable[[str], None]


@dataclass(frozen=True)
class Company:
    """Whose versions a lake holds.

    versions: SQL of the columns of billing.event_versions for the numbers n in [$first, $last), with `$topic`, `$customers`, and
    `$begin` and `$step` (seconds): the n-th happens n steps after the beginning, the last before END.
    webhooks: (how many, customers, seed) -> what is delivered later. tables: those that a batch of them goes to, in order.
    """

    begin: datetime
    versions: str
    webhooks: Callable[[int, int, int], list[bytes]]
    tables: Sequence[str]


def webhook(event_id: str, event_type: str, at: int, obj: Mapping[str, Any]) -> bytes:
    """The body that Stripe posts."""
    event = {"id": event_id, "object": "event", "type": event_type, "created": at, "livemode": True}
    return json.dumps(event | {"api_version": "2025-03-31.basil", "data": {"object": obj}}).encode()


def subscription(name: str, status: str, quantity: int) -> dict[str, Any]:
    """The subscription of a customer, to one price by the month."""
    price = {"id": "price_pro", "product": "prod_streamforge_pro", "unit_amount": 19900, "currency": "usd"}
    by_the_month = price | {"recurring": {"interval": "month", "interval_count": 1}}
    item = {"id": f"si_{name}", "object": "subscription_item", "quantity": quantity, "price": by_the_month}
    found = {"id": f"sub_{name}", "object": "subscription", "customer": f"cus_{name}", "status": status}
    return found | {
        "cancel_at_period_end": False,
        "start_date": 1_600_000_000,
        "items": {"object": "list", "data": [item]},
    }


def lay_down(lake: Lake, company: Company, versions: int, customers: int, say: Say) -> None:
    """Commit that many versions to billing.event_versions as if they had been received, and raw's positions with them.

    The files are as maintenance leaves them: an object's versions lie side by side.
    """
    begin = int(company.begin.timestamp())
    known = {"topic": TOPIC, "customers": customers, "begin": begin, "step": (END.timestamp() - begin) / versions}
    append_rows(lake, "raw.stripe_events", _raw([]), {}, {(TOPIC, 0): versions}, {TOPIC: "bench"})
    name = "billing.event_versions"
    table, declared = lake.open_for_write(name), lake.declaration(name)
    files: list[DataFile] = []
    for first in range(0, versions, CHUNK):
        say(f"laying down {first:,} of {versions:,} versions")
        with duckdb.connect(config={"threads": 2}) as connection:
            connection.execute("SET TimeZone = 'UTC'")
            of_chunk = known | {"first": first, "last": min(first + CHUNK, versions)}
            rows = connection.execute(company.versions, of_chunk).to_arrow_table()
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


def _deliver(lake: Lake, batch: Sequence[bytes], first: int) -> None:
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
    parts: dict[str, str]
    """Of each table seconds, MB and rows, as text."""


def one_batch(company: Company, versions: int, customers: int, count: int, say: Say, **whole: Any) -> Taken:
    """What a batch of webhooks takes on a lake that holds so many versions, after a small one as of a worker in use.

    whole: settings with which the tables are built before that.
    """
    with tempfile.TemporaryDirectory(prefix="bench-versions-") as home:
        lake = open_lake(Settings(home=Path(home), **whole), Run("bench", "bench"))
        lay_down(lake, company, versions, customers, say)
        say(f"building the tables of {versions:,} versions")
        run(lake, company.tables[1:])
        lake = open_lake(Settings(home=Path(home)), Run("bench", "bench"))  # type: ignore[call-arg]
        warm = company.webhooks(10, customers, 2)
        _deliver(lake, warm, versions)
        run(lake, company.tables)
        _deliver(lake, company.webhooks(count, customers, 1), versions + len(warm))
        say(f"one batch of {count:,} events on {versions:,} versions")
        taken = _taken_up(lake, company.tables)
    assert taken.reports["billing.event_versions"].rows == count, "every event of the batch is new"
    say(f"on {versions:,} versions: {taken.parts}")
    return taken


def compared(small: str, small_taken: Taken, large: str, large_taken: Taken) -> dict[str, float]:
    """The figures of two sizes, under their names, and their ratios."""
    found: dict[str, float] = {}
    for name, taken in ((small, small_taken), (large, large_taken)):
        found |= {f"seconds_at_{name}": round(taken.seconds, 2), f"mb_at_{name}": round(taken.mb, 1)}
        found[f"cpu_seconds_at_{name}"] = round(taken.cpu_seconds, 2)
    for figure, ratio in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio"), ("mb", "bytes_ratio")):
        found[ratio] = round(found[f"{figure}_at_{large}"] / found[f"{figure}_at_{small}"], 2)
    return found


def _taken_up(lake: Lake, tables: Sequence[str]) -> Taken:
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
