"""Repairing product.events after late billing: time, files and bytes written again, against the share of workspaces it concerns.

A month of 1 M events of 1,000 workspaces lies in `product.events` as compaction leaves it: one file for each day and bucket. Then
come late webhooks: `past_due` and, a while later, `active` again, of one workspace for one hour (`hour`), and of 0.1 %, 1 % and
10 % of the workspaces for one day each (`thousandth`, `hundredth`, `tenth`). Of each: seconds and CPU seconds of the run of
`product.events` alone, files and MB that were written again, rows whose attribution changed, and `amplification`: rows written by
rows changed. An hour of one workspace may write no more files than it has days. What is found is compared with what was said.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
from pyiceberg.manifest import DataFile

from benchmarks.versions import subscription, webhook
from lakehouse.append import append_rows
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.live import files_where
from lakehouse.positions import NUMBERED_HERE
from lakehouse.queries import query
from lakehouse.runner import run, run_table
from lakehouse.settings import Settings

EVENTS, WORKSPACES, DAYS = 1_000_000, 1_000, 30
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
END = BEGIN + timedelta(days=DAYS)
TABLE = "product.events"
BEFORE = (
    "billing.event_versions",
    "billing.object_heads",
    "billing.subscription_history",
    "billing.plan_timeline",
    "billing.workspace_customer_history",
    "product.user_workspace_history",
    "product.identifications",
    "product.anonymous_user_history",
)
CASES = {"hour": (0.0, timedelta(hours=1)), "thousandth": (0.001, timedelta(days=1))}
CASES |= {"hundredth": (0.01, timedelta(days=1)), "tenth": (0.1, timedelta(days=1))}
"""Share of the workspaces (at least one of them), and how long each was past due."""

PAYLOADS = """
SELECT $topic AS topic, 0 AS partition, n AS "offset", happened + INTERVAL 2 SECOND AS received_at, encode(
    '{"event_id":"' || md5(CAST(n AS VARCHAR)) || '","event_name":"feature_used","occurred_at":"'
    || strftime(happened AT TIME ZONE 'UTC', '%Y-%m-%dT%H:%M:%S.%fZ') || '","workspace_id":"ws_' || (n % $workspaces)
    || '","user_id":"usr_' || (n % 50000) || '","session_id":"s_' || md5(CAST(n // 20 AS VARCHAR))
    || '","feature":"captions","platform":"web","app_version":"4.1.0","country":"DE","schema_version":3,'
    || '"properties":{"video_id":"vid_' || md5(CAST(n * 3 AS VARCHAR)) || '","seconds":' || (n % 3600) || '}}'
) AS payload
FROM (SELECT n, to_timestamp($begin + n * $seconds::DOUBLE / $events) AS happened FROM range($events) AS t(n))
"""


@dataclass(frozen=True)
class PastDue:
    """Of which workspace (a number), from when and until when."""

    workspace: int
    start: datetime
    end: datetime


def one_run(scale: float, say: Callable[[str], None]) -> dict[str, float]:
    """The four cases one after the other, each of workspaces of its own; scale shrinks events and workspaces alike."""
    events, workspaces = max(2000, int(EVENTS * scale)), max(40, int(WORKSPACES * scale))
    rng, found = random.Random(7), dict[str, float]()
    fresh = iter(rng.sample(range(workspaces), workspaces))
    with tempfile.TemporaryDirectory(prefix="bench-repair-") as home:
        settings = Settings(home=Path(home), batch_rows=max(EVENTS, events))  # type: ignore[call-arg]
        lake = open_lake(settings, Run("bench", "bench"))
        say(f"cleaning {events:,} events of {workspaces:,} workspaces")
        said = _lay_down(lake, events, workspaces)
        for case, (share, span) in CASES.items():
            begins = [BEGIN + timedelta(hours=rng.randrange(24 * (DAYS - 1))) for _ in range(max(1, round(workspaces * share)))]
            late = [PastDue(next(fresh), start, start + span) for start in begins]
            figures = _repaired(lake, late, said)
            said += 2 * len(late)
            say(f"{case}: {figures}")
            if case == "hour":
                days = {(late[0].start + s).date() for s in (timedelta(), span - timedelta(microseconds=1))}
                assert figures["files"] <= len(days), "one file for each day and bucket"
            found |= {f"{case}_{name}": value for name, value in figures.items()}
    return found


def _lay_down(lake: Lake, events: int, workspaces: int) -> int:
    """Everybody's subscription, mapping and events, cleaned in one batch; returns how many webhooks there were."""
    _say(lake, [_webhook(n, n, BEGIN - timedelta(days=30), "active") for n in range(workspaces)], 0, BEGIN)
    mapped = {"workspace_id": [f"ws_{n}" for n in range(workspaces)], "customer_id": [f"cus_{n}" for n in range(workspaces)]}
    since = pa.array([BEGIN - timedelta(days=30)] * workspaces, pa.timestamp("us", "UTC"))
    fixed = {"mapping_id": pa.nulls(workspaces, pa.string()), "deleted": pa.array([False] * workspaces)}
    times = dict.fromkeys(("received_at", "effective_at", "updated_at"), since)
    _append(lake, "raw.crm_workspaces", "crm", pa.table(mapped | fixed | times), 0, NUMBERED_HERE)
    with duckdb.connect(config={"threads": 2}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        known = {"topic": "product", "begin": BEGIN.timestamp(), "seconds": DAYS * 86_400, "events": events}
        records = connection.execute(PAYLOADS, known | {"workspaces": workspaces}).to_arrow_table()
    append_rows(lake, "raw.product_events", records, {("product", 0): 0}, {("product", 0): events}, {"product": "bench"})
    run(lake, [*BEFORE, TABLE])
    files = _files(lake)
    assert len({str(f.partition) for f in files}) == len(files), "one file for each day and bucket"
    assert _count(lake, "attribution = 'resolved' AND billing_status = 'active'") == events, "every event has its plan"
    return workspaces


def _repaired(lake: Lake, late: Sequence[PastDue], said: int) -> dict[str, float]:
    """Bring the late webhooks, and say what repairing the events took; it must give what was said."""
    webhooks = []
    for n, due in enumerate(late):
        webhooks.append(_webhook(said + 2 * n, due.workspace, due.start, "past_due"))
        webhooks.append(_webhook(said + 2 * n + 1, due.workspace, due.end, "active"))
    _say(lake, webhooks, said, END)
    run(lake, BEFORE)
    before, was = {f.file_path for f in _files(lake)}, _count(lake, "billing_status = 'past_due'")
    began, used = time.perf_counter(), time.process_time()
    report = run_table(lake, TABLE)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    new = [f for f in _files(lake) if f.file_path not in before]
    changed = _count(lake, "billing_status = 'past_due'") - was
    expected = " OR ".join(
        f"(workspace_id = 'ws_{d.workspace}' AND occurred_at >= '{d.start.isoformat()}' AND occurred_at < '{d.end.isoformat()}')"
        for d in late
    )
    assert changed == _count(lake, expected) == _count(lake, f"billing_status = 'past_due' AND ({expected})"), "as was said"
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "files": report.files_removed,
        "mb": round(sum(f.file_size_in_bytes for f in new) / 1e6, 3),
        "rows_changed": changed,
        "amplification": round(sum(f.record_count for f in new) / max(1, changed), 1),
    }


def _webhook(number: int, workspace: int, at: datetime, status: str) -> bytes:
    """What Stripe says of the subscription of the workspace's customer at that second."""
    told = subscription(str(workspace), status, 1)
    return webhook(f"evt_{number}", "customer.subscription.updated", int(at.timestamp()), told)


def _say(lake: Lake, webhooks: Sequence[bytes], first: int, received: datetime) -> None:
    n = len(webhooks)
    when = pa.array([received] * n, pa.timestamp("us", "UTC"))
    rows = pa.table({"payload": pa.array(webhooks, pa.binary()), "received_at": when, "source": ["webhook"] * n})
    _append(lake, "raw.stripe_events", "stripe", rows, first, "bench")


def _append(lake: Lake, name: str, topic: str, rows: pa.Table, first: int, source: str) -> None:
    """Append the rows to a raw table as those of the topic's one partition from that offset on."""
    n, at = rows.num_rows, (topic, 0)
    offsets = pa.array(range(first, first + n), pa.int64())
    coordinates = {"topic": pa.array([topic] * n), "partition": pa.array([0] * n, pa.int32()), "offset": offsets}
    whole = pa.table(coordinates | {c: rows.column(c) for c in rows.column_names})
    append_rows(lake, name, whole, {at: first} if first else {}, {at: first + n}, {topic: source})


def _files(lake: Lake) -> Sequence[DataFile]:
    return files_where(lake.load(TABLE))


def _count(lake: Lake, where: str) -> int:
    return int(pl.DataFrame(query(lake, f"SELECT count(*) AS n FROM {TABLE} WHERE {where}")).item())
