"""A billing batch at 10 times the usual rate, on tables that hold 1 M and 20 M versions of the same company; and a full rebuild.

The batch: 42,000 events (2 minutes of 3 M a day, ten times over), uniform over the objects, 1 % of them more than a year old,
from raw to committed event versions, heads, current and history tables. The company has the same customers at 1 M and at 20 M,
only more events of each, and the worker has done a small batch before, as one in use has. Figures: seconds and bytes of the batch
on each (read and written through system calls, cached or not; the index of ids is mapped, and not in them), and their ratios;
events/s of a rebuild of every table from 10 M event versions; peak memory of all.
"""

from __future__ import annotations

import hashlib
import random
import resource
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from benchmarks.versions import END, Company, Say, compared, lay_down, one_batch, subscription, webhook
from lakehouse.lake import Run, open_lake
from lakehouse.runner import run
from lakehouse.settings import Settings

CUSTOMERS, SMALL, LARGE, BATCH, REBUILD = 50_000, 1_000_000, 20_000_000, 42_000, 10_000_000
BEGIN = END - timedelta(days=365 * 3)
TABLES = (
    "billing.event_versions",
    "billing.object_heads",
    "billing.customers",
    "billing.customer_history",
    "billing.subscriptions",
    "billing.subscription_history",
    "billing.subscription_items",
    "billing.subscription_item_history",
)

# One version a step: nine of ten of a subscription, one of a customer; each object's in order, the whole spread over the years.
VERSIONS = """
SELECT
    'platform' AS account, true AS livemode, 'evt_' || n AS event_id,
    CASE WHEN is_customer THEN 'customer.updated' ELSE 'customer.subscription.updated' END AS event_type,
    CASE WHEN is_customer THEN 'customer' ELSE 'subscription' END AS object_type,
    CASE WHEN is_customer THEN 'cus_' ELSE 'sub_' END || md5(CAST(object AS VARCHAR))[:14] AS object_id,
    'cus_' || md5(CAST(object AS VARCHAR))[:14] AS customer_id,
    to_timestamp($begin + n * $step) AS created_at,
    '2025-03-31.basil' AS api_version, 'webhook' AS source, false AS nested, false AS deleted, 1 AS rank,
    CASE WHEN is_customer THEN json_object(
        'customer_id', 'cus_' || md5(CAST(object AS VARCHAR))[:14], 'email', 'c' || object || '@example.com', 'currency', 'usd',
        'delinquent', version % 3 = 0, 'created', 1600000000)
    ELSE json_object(
        'customer_id', 'cus_' || md5(CAST(object AS VARCHAR))[:14],
        'status', CASE version % 4 WHEN 0 THEN 'past_due' ELSE 'active' END,
        'price_id', 'price_pro', 'product_id', 'prod_streamforge_pro', 'quantity', 1 + version // 2 % 50, 'currency', 'usd',
        'unit_amount_minor', 19900, 'billing_interval', 'month', 'billing_interval_count', 1, 'cancel_at_period_end', false,
        'started_at', 1600000000, 'items', [json_object(
            'subscription_item_id', 'si_' || md5(CAST(object AS VARCHAR))[:14], 'price_id', 'price_pro',
            'product_id', 'prod_streamforge_pro', 'quantity', 1 + version // 2 % 50, 'unit_amount_minor', 19900)])
    END AS state,
    NULL::VARCHAR AS previous, NULL::VARCHAR AS extra,
    to_timestamp($begin + n * $step + 2) AS recorded_at, $topic AS topic, 0 AS partition, n AS "offset"
FROM (
    SELECT
        n, n % 10 = 9 AS is_customer, (n // 10 * 7919 + n % 10 * 104729) % $customers AS object,
        n // 10 // $customers AS version
    FROM range($first, $last) AS t(n)
)
"""


def _webhooks(count: int, customers: int, seed: int) -> list[bytes]:
    """Webhooks of two minutes: nine of ten of a subscription, one of a customer; 1 % between a year and the beginning old."""
    rng, found = random.Random(seed), []
    for i in range(count):
        hashed = hashlib.md5(str(rng.randrange(customers)).encode()).hexdigest()[:14]
        at = END + timedelta(seconds=1 + i * 120 / count)
        if i % 100 == 0:
            at = datetime.fromtimestamp(rng.uniform(BEGIN.timestamp(), END.timestamp() - 366 * 86_400), UTC)
        if i % 10 == 9:
            kind, obj = "customer.updated", {"id": f"cus_{hashed}", "object": "customer", "delinquent": rng.random() < 0.5}
            obj |= {"email": f"{hashed}@example.com", "currency": "usd", "created": 1_600_000_000}
        else:
            kind, obj = "customer.subscription.updated", subscription(hashed, "active", rng.randint(1, 60))
            obj |= {"metadata": {"filler": "x" * 400}}
        found.append(webhook(f"evt_new_{seed}_{i}", kind, int(at.timestamp()), obj))
    return found


COMPANY = Company(BEGIN, VERSIONS, _webhooks, TABLES)


def one_run(scale: float, say: Say) -> dict[str, float]:
    """Both sizes and the rebuild; scale shrinks everything alike, the customers too."""
    customers, count, rebuilt = (int(n * scale) for n in (CUSTOMERS, BATCH, REBUILD))
    small, large = (one_batch(COMPANY, int(n * scale), customers, count, say) for n in (SMALL, LARGE))
    found = compared("1m", small, "20m", large)
    with tempfile.TemporaryDirectory(prefix="bench-billing-") as home:
        lake = open_lake(Settings(home=Path(home)), Run("bench", "bench"))  # type: ignore[call-arg]
        lay_down(lake, COMPANY, rebuilt, customers, say)
        say(f"rebuilding every table from {rebuilt:,} versions")
        cpu, started = time.process_time(), time.monotonic()
        reports = run(lake, TABLES[1:])
        found["rebuild_events_per_second"] = round(rebuilt / (time.monotonic() - started))
        found["rebuild_cpu_us_per_event"] = round((time.process_time() - cpu) * 1e6 / rebuilt, 2)
        say(f"seconds by table: { {r.table: round(r.seconds, 1) for r in reports} }")
    found["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return found
