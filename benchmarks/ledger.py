"""A batch of money and plans: its ledger, plan timeline and MRR movements, on 200 K and 4 M versions of the same kind.

Two minutes at the usual rate (4,200 events, uniform over all that ever was): changes of subscriptions, refunds of old charges,
new charges and invoices; from raw to committed event versions, heads, links, subscription history, timeline, movements and
ledger. The larger lake has as many more customers as it has versions. Figures: seconds, CPU seconds and MB (read and written
through system calls, cached or not) of the batch on each, and their ratios.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.versions import END, Taken, deliver, lay_down, taken_up
from lakehouse.lake import Run, open_lake
from lakehouse.runner import run
from lakehouse.settings import Settings

SMALL, LARGE, BATCH, OF_ONE = 200_000, 4_000_000, 4_200, 10
"""OF_ONE: versions of one customer, whatever the size."""

BEGIN = END - timedelta(days=365 * 2)
TABLES = (
    "billing.event_versions",
    "billing.object_heads",
    "billing.object_links",
    "billing.subscription_history",
    "billing.plan_timeline",
    "billing.mrr_movements",
    "billing.revenue_ledger",
)

# Of one customer: four versions of its subscription, an invoice, a charge, a part of it refunded, and what that moved.
VERSIONS = """
SELECT
    'platform' AS account, true AS livemode, 'evt_' || n AS event_id,
    CASE kind WHEN 'sub' THEN 'customer.subscription.updated' WHEN 'in' THEN 'invoice.finalized' WHEN 'ch' THEN 'charge.succeeded'
        ELSE 'refund.created' END AS event_type,
    CASE kind WHEN 'sub' THEN 'subscription' WHEN 'in' THEN 'invoice' WHEN 'ch' THEN 'charge' WHEN 're' THEN 'refund'
        ELSE 'balance_transaction' END AS object_type,
    kind || '_' || hashed AS object_id, CASE WHEN kind IN ('sub', 'in', 'ch') THEN 'cus_' || hashed END AS customer_id,
    created_at,
    '2025-03-31.basil' AS api_version, 'webhook' AS source, false AS nested, false AS deleted, 1 AS rank,
    CASE kind
        WHEN 'sub' THEN json_object(
            'customer_id', 'cus_' || hashed, 'status', CASE part WHEN 2 THEN 'past_due' ELSE 'active' END,
            'price_id', 'price_pro', 'product_id', 'prod_streamforge_pro', 'quantity', 1 + part, 'currency', 'usd',
            'unit_amount_minor', 19900, 'billing_interval', 'month', 'billing_interval_count', 1,
            'cancel_at_period_end', false, 'started_at', 1600000000, 'items', [json_object(
                'subscription_item_id', 'si_' || hashed, 'price_id', 'price_pro', 'product_id', 'prod_streamforge_pro',
                'quantity', 1 + part, 'currency', 'usd', 'unit_amount_minor', 19900, 'billing_interval', 'month',
                'billing_interval_count', 1)])
        WHEN 'in' THEN json_object(
            'customer_id', 'cus_' || hashed, 'status', CASE part WHEN 4 THEN 'open' ELSE 'paid' END, 'currency', 'usd',
            'total_minor', 19900, 'finalized_at', epoch(created_at)::BIGINT)
        WHEN 'ch' THEN json_object(
            'customer_id', 'cus_' || hashed, 'status', 'succeeded', 'currency', 'usd', 'amount_minor', 19900, 'captured', true,
            'amount_captured_minor', 19900, 'amount_refunded_minor', CASE part WHEN 6 THEN 0 ELSE 900 END, 'created', $begin)
        WHEN 're' THEN json_object(
            'charge_id', 'ch_' || hashed, 'status', 'succeeded', 'currency', 'usd', 'amount_minor', 900,
            'created', epoch(created_at)::BIGINT)
        ELSE json_object(
            'source_id', 're_' || hashed, 'currency', 'usd', 'amount_minor', -900, 'fee_minor', 0,
            'created', epoch(created_at)::BIGINT)
    END AS state,
    NULL::VARCHAR AS previous, NULL::VARCHAR AS extra,
    created_at + INTERVAL 2 SECOND AS recorded_at, $topic AS topic, 0 AS partition, n AS "offset"
FROM (
    SELECT
        n, n // $customers AS part, md5(CAST(n % $customers AS VARCHAR))[:14] AS hashed,
        to_timestamp($begin + n * $step) AS created_at,
        ['sub', 'sub', 'sub', 'sub', 'in', 'in', 'ch', 'ch', 're', 'txn'][n // $customers + 1] AS kind
    FROM range($first, $last) AS t(n)
)
"""


def one_run(scale: float, say: Callable[[str], None]) -> dict[str, float]:
    """Both sizes; scale shrinks the lakes and the batch alike."""
    found: dict[str, float] = {}
    for name, versions in (("200k", SMALL), ("4m", LARGE)):
        with tempfile.TemporaryDirectory(prefix="bench-ledger-") as home:
            taken = _measure(Path(home), int(versions * scale), int(BATCH * scale), say)
        found |= {f"seconds_at_{name}": round(taken.seconds, 2), f"mb_at_{name}": round(taken.mb, 1)}
        found[f"cpu_seconds_at_{name}"] = round(taken.cpu_seconds, 2)
    for figure, ratio in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio"), ("mb", "bytes_ratio")):
        found[ratio] = round(found[f"{figure}_at_4m"] / found[f"{figure}_at_200k"], 2)
    return found


def _measure(home: Path, versions: int, count: int, say: Callable[[str], None]) -> Taken:
    """What one batch takes on a lake of so many versions."""
    customers = max(1, versions // OF_ONE)
    # a whole history in few slices, each of which looks at all versions; what is measured has the settings of every day
    whole = Settings(home=home, batch_rows=1_000_000, duckdb_memory="2GB")  # type: ignore[call-arg]
    lake = open_lake(whole, Run("bench", "bench"))
    begin, end = int(BEGIN.timestamp()), int(END.timestamp())
    known = {"begin": begin, "step": (end - begin) / versions, "customers": customers}
    lay_down(lake, VERSIONS, versions, known, say)
    say(f"building the tables of {versions:,} versions")
    run(lake, TABLES[1:])
    lake = open_lake(Settings(home=home), Run("bench", "bench"))  # type: ignore[call-arg]
    warm = _batch(10, customers, 2)
    deliver(lake, warm, versions)
    run(lake, TABLES)
    deliver(lake, _batch(count, customers, 1), versions + len(warm))
    say(f"one batch of {count:,} events on {versions:,} versions")
    taken = taken_up(lake, TABLES)
    assert taken.reports["billing.event_versions"].rows == count, "every event of the batch is new"
    say(f"on {versions:,} versions: {taken.parts}")
    return taken


def _batch(count: int, customers: int, seed: int) -> list[bytes]:
    """Webhooks of two minutes, about any of the customers: of five two of subscriptions, three of money."""
    rng, found = random.Random(seed), []
    for i in range(count):
        hashed = hashlib.md5(str(rng.randrange(customers)).encode()).hexdigest()[:14]
        at = int((END + timedelta(seconds=1 + i * 120 / count)).timestamp())
        kind, obj = _told(i % 5, hashed, f"{hashed}_{seed}_{i}", at, rng)
        event = {"id": f"evt_new_{seed}_{i}", "object": "event", "type": kind, "created": at, "livemode": True}
        found.append(json.dumps(event | {"api_version": "2025-03-31.basil", "data": {"object": obj}}).encode())
    return found


def _told(kind: int, hashed: str, new: str, at: int, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """An event's type and object; `new` names an object that is new with it."""
    if kind == 0:
        refund = {"id": f"re_{new}", "object": "refund", "charge": f"ch_{hashed}", "amount": 50, "currency": "usd"}
        return "refund.created", refund | {"status": "succeeded", "created": at}
    if kind == 1:
        charge = {"id": f"ch_{new}", "object": "charge", "customer": f"cus_{hashed}", "amount": 900, "currency": "usd"}
        return "charge.succeeded", charge | {"status": "succeeded", "captured": True, "amount_captured": 900, "created": at}
    if kind == 2:
        invoice = {"id": f"in_{new}", "object": "invoice", "customer": f"cus_{hashed}", "currency": "usd", "total": 900}
        return "invoice.finalized", invoice | {"status": "open", "status_transitions": {"finalized_at": at}}
    price: dict[str, Any] = {"id": "price_pro", "product": "prod_streamforge_pro", "unit_amount": 19900, "currency": "usd"}
    price |= {"recurring": {"interval": "month", "interval_count": 1}}
    item: dict[str, Any] = {"id": f"si_{hashed}", "object": "subscription_item", "price": price, "quantity": rng.randint(10, 60)}
    subscription: dict[str, Any] = {"id": f"sub_{hashed}", "object": "subscription", "customer": f"cus_{hashed}"}
    subscription |= {
        "status": "active",
        "cancel_at_period_end": False,
        "start_date": 1_600_000_000,
        "items": {"object": "list", "data": [item]},
    }
    return "customer.subscription.updated", subscription
