"""Short spellings of the objects that money depends on: charges, refunds, disputes, invoices, credit notes, balance transactions.

Times are ISO text; whatever is given beside the short fields goes into the payload as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

Spec = dict[str, Any]
OLD, BASIL = "2024-06-20", "2025-03-31.basil"


def epoch(text: str | int | None) -> int | None:
    """Seconds of an ISO time."""
    return int(datetime.fromisoformat(text).timestamp()) if isinstance(text, str) else text


def _rest(spec: Spec, *taken: str) -> Spec:
    return {k: v for k, v in spec.items() if k not in taken}


def charge(spec: Spec, at: str, shape: str) -> Spec:
    """`amount` is captured at once, unless `captured` says how much; `refunded`: the running total; `made`: its creation."""
    amount, status = spec.get("amount", 1000), spec.get("status", "succeeded")
    captured = spec.get("captured", amount if status == "succeeded" else 0)
    found = {
        "id": spec.get("id", "ch_1"),
        "object": "charge",
        "amount": amount,
        "amount_captured": captured,
        "amount_refunded": spec.get("refunded", 0),
        "captured": captured > 0,
        "created": epoch(spec.get("made", at)),
        "currency": spec.get("currency", "usd"),
        "customer": spec.get("customer", "cus_1"),
        "status": status,
    }
    if shape == OLD:
        found["invoice"] = "in_1"
    if "refunds" in spec:
        found["refunds"] = {"object": "list", "data": [refund(r, at, shape) for r in spec["refunds"]]}
    return found | _rest(spec, "amount", "captured", "refunded", "made", "refunds")


def refund(spec: Spec, at: str, shape: str) -> Spec:
    """A refund of `charge` (ch_1)."""
    return {
        "id": "re_1",
        "object": "refund",
        "amount": 1000,
        "charge": "ch_1",
        "created": epoch(spec.get("made", at)),
        "currency": "usd",
        "reason": None,
        "status": "succeeded",
    } | _rest(spec, "made")


def dispute(spec: Spec, at: str, shape: str) -> Spec:
    """A dispute of `charge` (ch_1); `moved`: its balance transactions, {id, amount, fee, at}."""
    currency = spec.get("currency", "usd")
    found: Spec = {
        "id": "dp_1",
        "object": "dispute",
        "amount": 1000,
        "charge": "ch_1",
        "created": epoch(spec.get("made", at)),
        "currency": currency,
        "status": "needs_response",
    }
    if spec.get("moved", []) is not None:
        found["balance_transactions"] = [
            {
                "object": "balance_transaction",
                "fee": 0,
                "currency": currency,
                "created": epoch(m.get("at", at)),
                "source": spec.get("id", "dp_1"),
            }
            | _rest(m, "at")
            for m in spec.get("moved", [])
        ]
    return found | _rest(spec, "made", "moved")


def invoice(spec: Spec, at: str, shape: str) -> Spec:
    """An invoice over `total` (1000); `finalized`, `paid`, `voided`, `uncollectible`: times."""
    total = spec.get("total", 1000)
    found = {
        "id": "in_1",
        "object": "invoice",
        "currency": "usd",
        "customer": "cus_1",
        "status": "open",
        "total": total,
        "total_excluding_tax": total,
        "amount_remaining": 0 if spec.get("status") == "paid" else total,
        "status_transitions": {
            "finalized_at": epoch(spec.get("finalized")),
            "paid_at": epoch(spec.get("paid")),
            "voided_at": epoch(spec.get("voided")),
            "marked_uncollectible_at": epoch(spec.get("uncollectible")),
        },
    }
    return found | _rest(spec, "finalized", "paid", "voided", "uncollectible")


def credit_note(spec: Spec, at: str, shape: str) -> Spec:
    """A credit note on `invoice` (in_1) over `total` (1000)."""
    total = spec.get("total", 1000)
    return {
        "id": "cn_1",
        "object": "credit_note",
        "amount": total,
        "created": epoch(spec.get("made", at)),
        "currency": "usd",
        "customer": "cus_1",
        "invoice": "in_1",
        "status": "issued",
        "total": total,
        "total_excluding_tax": total,
        "voided_at": epoch(spec.get("voided")),
    } | _rest(spec, "made", "voided")


def balance_transaction(spec: Spec, at: str, shape: str) -> Spec:
    """A balance transaction as the API gives it: `source`, `amount`, `fee`."""
    return {
        "id": "txn_1",
        "object": "balance_transaction",
        "amount": 1000,
        "created": epoch(spec.get("made", at)),
        "currency": "usd",
        "fee": 0,
        "reporting_category": "charge",
        "source": "ch_1",
        "type": "charge",
    } | _rest(spec, "made")


OBJECTS: dict[str, Callable[[Spec, str, str], Spec]] = {
    "charge": charge,
    "refund": refund,
    "dispute": dispute,
    "invoice": invoice,
    "credit_note": credit_note,
    "balance_transaction": balance_transaction,
}
