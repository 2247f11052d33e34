"""Raw to committed product.events: parse, refuse, deduplicate, attribute and write; and how that grows with the ids known.

events_per_second: 4 M events of about 730 B (5 % of them copies, one in ten up to 72 h late) in micro-batches of 1 M, against
50 M earlier ids, 100,000 customers with 1 M plan intervals. seconds_at_20m_ids and seconds_at_200m_ids: one such batch on tables
that hold so many ids of the same 72 h, and ratio of the two. The earlier events are laid down in columns, with what the
deduplication needs, through the staging code; the index of their ids is made before the clock starts, as it was in the batches
that brought them. cpu_us_per_event: all threads. peak_rss_mb: of the process while it cleans the 4 M events, with what it still
holds from laying the earlier ones down.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa

from benchmarks.measure import forget_peak, peak_rss_mb
from lakehouse.append import append_rows
from lakehouse.commit import Change, commit
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.runner import run_table
from lakehouse.settings import Settings
from lakehouse.staging import stage
from lakehouse.transforms import load_transforms

EVENTS, BATCH, KNOWN, SMALL, LARGE, CUSTOMERS, CHUNK = (
    4_000_000,
    1_000_000,
    50_000_000,
    20_000_000,
    200_000_000,
    100_000,
    2_000_000,
)
WINDOW = 72 * 3600
END = int(datetime(2026, 1, 10, 12, tzinfo=UTC).timestamp())
TOPIC, TABLE = "product.events", "product.events"
CLEAN = ("product.identifications", "product.anonymous_user_history", TABLE)
"""The events, and what says who an anonymous id is, which comes from the same records: its time counts as well."""

# The nth event ever, n counting from the oldest: when it happened, spread over the 72 hours before END.
OF_N = "printf('%s-%d', md5(CAST(n AS VARCHAR))[:24], n)"

EARLIER = f"""
SELECT
    {OF_N} AS event_id, 'feature_used' AS event_name, happened AS occurred_at, happened + INTERVAL 2 SECOND AS received_at,
    'ws_' || (n * 7919 % $customers) AS workspace_id, n AS content_hash, 2::BIGINT AS lateness_seconds, false AS late,
    'resolved' AS attribution, 'platform' AS account, 'active' AS billing_status, $topic AS topic, 1 AS partition, n AS "offset"
FROM (SELECT n, to_timestamp($end - $window + n * $window::DOUBLE / $known) AS happened FROM range($first, $last) AS t(n))
"""

# A copy carries the id of an earlier event of the batch; a late one happened any time in the 72 hours.
PAYLOADS = f"""
SELECT $topic AS topic, 0 AS partition, i AS "offset", to_timestamp($end + 60 + i * 0.00001) AS received_at, encode(
    '{{"event_id":"' || {OF_N} || '","event_name":"feature_used","occurred_at":"'
    || strftime(make_timestamp(at_us), '%Y-%m-%dT%H:%M:%S.%gZ')
    || '","sent_at":"' || strftime(make_timestamp(at_us + 400000), '%Y-%m-%dT%H:%M:%S.%gZ')
    || '","workspace_id":"ws_' || (n * 7919 % $customers) || '","user_id":"usr_' || (n * 31 % 1200000)
    || '","anonymous_id":"an_' || md5(CAST(n % 5000000 AS VARCHAR)) || '","session_id":"s_' || md5(CAST(n // 20 AS VARCHAR))
    || '","feature":"' || ['captions', 'upload', 'playback', 'analytics', 'sso'][1 + n % 5]
    || '","platform":"' || ['web', 'ios', 'android'][1 + n % 3] || '","app_version":"4.' || (n % 40) || '.1","country":"'
    || ['DE', 'US', 'FR', 'BR'][1 + n % 4] || '","ip":"10.' || (n % 250) || '.' || (n // 250 % 250) || '.7",'
    || '"user_agent":"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0",'
    || '"schema_version":3,"properties":{{"video_id":"vid_' || md5(CAST(n * 3 AS VARCHAR)) || '","seconds":' || (n % 3600)
    || ',"quality":"1080p"}},"context":{{"page":"/watch","referrer":"https://example.com/","screen":{{"w":1920,"h":1080}}}}}}'
) AS payload
FROM (
    SELECT i, n, CASE WHEN n % 10 = 0 THEN ($end - $window)::BIGINT * 1000000 + n * 7919 % $window * 1000000
        ELSE $end::BIGINT * 1000000 + (n - $known) * 10 END AS at_us
    FROM (SELECT i, $known + CASE WHEN i % 20 = 19 THEN i - 19 ELSE i END AS n FROM range($first, $last) AS t(i))
)
"""

OWNERS = """
SELECT 'ws_' || n AS workspace_id, 'platform' AS account, 'cus_' || n AS customer_id, to_timestamp($begin) AS valid_from
FROM range($customers) AS t(n)
"""


def _rows(sql: str, **known: object) -> pa.Table:
    with duckdb.connect(config={"threads": 2}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        return connection.execute(sql, known).to_arrow_table()


def _lay_down(lake: Lake, known: int, customers: int, say: Callable[[str], None]) -> None:
    """Commit `known` events, spread over the 72 h before END, and the customers' plans."""
    begin = END - 30 * 86_400
    _commit(lake, "billing.workspace_customer_history", [_rows(OWNERS, begin=begin, customers=customers)])
    _commit(lake, "billing.plan_timeline", [_rows(_timeline_sql(lake), begin=begin, customers=customers)])
    _commit(
        lake, TABLE, _chunks(EARLIER, 0, known, known, customers, lambda done: say(f"laying down {done:,} of {known:,} events"))
    )


def _timeline_sql(lake: Lake) -> str:
    """Ten intervals a customer, each three days long, the last one open."""
    fixed = {
        "account": "'platform'",
        "customer_id": "'cus_' || n",
        "subscription_id": "'sub_' || n",
        "plan": "['starter', 'pro', 'enterprise'][1 + k % 3]",
        "plan_rank": "(1 + k % 3)::INT",
        "price_id": "'price_' || k",
        "billing_status": "'active'",
        "valid_from": "to_timestamp($begin + k * 3 * 86400)",
        "valid_to": "CASE WHEN k < 9 THEN to_timestamp($begin + (k + 1) * 3 * 86400) END",
    }
    declared = [c.name for c in lake.declaration("billing.plan_timeline").columns]
    columns = ", ".join(f"{sql} AS {name}" for name, sql in fixed.items() if name in declared)
    return f"SELECT {columns} FROM range($customers) AS t(n), range(10) AS s(k)"


def _chunks(
    sql: str, first: int, last: int, known: int, customers: int, say: Callable[[int], None] = lambda _: None
) -> Iterator[pa.Table]:
    """The rows of EARLIER or PAYLOADS from `first` to before `last`, CHUNK at a time."""
    span = {"end": END, "window": WINDOW, "known": known, "customers": customers, "topic": TOPIC}
    for a in range(first, last, CHUNK):
        say(a)
        yield _rows(sql, first=a, last=min(a + CHUNK, last), **span)


def _commit(lake: Lake, name: str, rows: Iterable[pa.Table]) -> None:
    table, declared = lake.open_for_write(name), lake.declaration(name)
    commit(table, lake.run, Change(name, {}, {}, add=[f for part in rows for f in stage(table, declared, part)]))


def _feed(lake: Lake, first: int, last: int, known: int, customers: int) -> None:
    at = first
    for rows in _chunks(PAYLOADS, first, last, known, customers):
        end = at + rows.num_rows
        append_rows(lake, "raw.product_events", rows, {(TOPIC, 0): at}, {(TOPIC, 0): end}, {TOPIC: "bench"})
        at = end


def _work(lake: Lake, events: int) -> tuple[float, float]:
    """(wall seconds, CPU seconds) of cleaning the events that were fed, to the last commit."""
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    began, used, written = time.monotonic(), time.process_time(), 0
    for name in CLEAN:
        while True:
            report = run_table(lake, name, transforms)
            if name == TABLE:
                written += report.rows
            if report.caught_up:
                break
    seconds, cpu = time.monotonic() - began, time.process_time() - used
    assert written == events - events // 20, f"each event once: {written:,} of {events:,} sent"
    return seconds, cpu


def _batch(scale: float) -> int:
    return max(20, int(BATCH * scale)) // 20 * 20


def _measure(home: Path, known: int, events: int, scale: float, say: Callable[[str], None]) -> tuple[float, float]:
    batch = _batch(scale)
    customers = max(100, int(CUSTOMERS * scale))
    lake = open_lake(Settings(home=home, batch_rows=batch, duckdb_memory="2GB"), Run("bench", "bench"))  # type: ignore[call-arg]
    _lay_down(lake, known, customers, say)
    say("one micro-batch to make the indexes of the earlier ids")
    _feed(lake, 0, batch, known, customers)
    _work(lake, batch)
    _feed(lake, batch, batch + events, known, customers)
    say(f"{events:,} events on {known:,} earlier ids")
    forget_peak()
    return _work(lake, events)


def one_run(scale: float, say: Callable[[str], None]) -> dict[str, float]:
    """All three tables, one after the other; scale shrinks everything alike."""
    found: dict[str, float] = {}
    events = max(80, int(EVENTS * scale)) // 20 * 20
    with tempfile.TemporaryDirectory(prefix="bench-clean-") as home:
        seconds, cpu = _measure(Path(home), int(KNOWN * scale), events, scale, say)
    found |= {"events_per_second": round(events / seconds), "cpu_us_per_event": round(cpu * 1e6 / events, 2)}
    found["peak_rss_mb"] = round(peak_rss_mb(os.getpid()))
    batch = _batch(scale)
    for name, known in (("20m", SMALL), ("200m", LARGE)):
        with tempfile.TemporaryDirectory(prefix="bench-clean-") as home:
            seconds, _ = _measure(Path(home), int(known * scale), batch, scale, say)
        found[f"seconds_at_{name}_ids"] = round(seconds, 3)
    found["ratio"] = round(found["seconds_at_200m_ids"] / found["seconds_at_20m_ids"], 3)
    return found
