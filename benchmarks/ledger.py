"""A batch of money and plans: its ledger, plan timeline and MRR movements, on 200 K and 4 M versions of the same kind.

Two minutes at the usual rate (4,200 events, uniform over all that ever was): changes of subscriptions, refunds of old charges,
new charges and invoices; from raw to committed event versions, heads, links, subscription history, timeline, movements and
ledger. The larger lake has as many more customers as it has versions. Figures: seconds, CPU seconds and MB (read and written
through system calls, cached or not) of the batch on each, and their ratios.
"""

from __future__ import annotations

import hashlib
import random
from datetime import timedelta
from typing import Any

from benchmarks.versions import END, Company, Say, compared, one_batch, subscription, webhook

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


def _webhooks(count: int, customers: int, seed: int) -> list[bytes]:
    """Webhooks of two minutes, about any of the customers: of five two of subscriptions, three of money."""
    rng, found = random.Random(seed), []
    for i in range(count):
        hashed = hashlib.md5(str(rng.randrange(customers)).encode()).hexdigest()[:14]
        at = int((END + timedelta(seconds=1 + i * 120 / count)).timestamp())
        kind, obj = _told(i % 5, hashed, f"{hashed}_{seed}_{i}", at, rng)
        found.append(webhook(f"evt_new_{seed}_{i}", kind, at, obj))
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
    return "customer.subscription.updated", subscription(hashed, "active", rng.randint(10, 60))


COMPANY = Company(BEGIN, VERSIONS, _webhooks, TABLES)


def one_run(scale: float, say: Say) -> dict[str, float]:
    """Both sizes; scale shrinks the lakes and the batch alike."""
    # a whole history is built in few slices, each of which looks at all versions: that takes memory
    whole = {"batch_rows": 1_000_000, "duckdb_memory": "2GB"}
    sizes = (max(OF_ONE, int(n * scale)) for n in (SMALL, LARGE))
    small, large = (one_batch(COMPANY, n, n // OF_ONE, int(BATCH * scale), say, **whole) for n in sizes)
    return compared("200k", small, "4m", large)
