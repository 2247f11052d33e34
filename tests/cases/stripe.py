"""Short spellings for the golden cases: a Stripe event in a few words becomes a payload of the shape asked for."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from tests.cases.money import OBJECTS

PRICES = {
    "starter": ("price_starter", "prod_streamforge_starter", 4900, "month"),
    "pro": ("price_pro", "prod_streamforge_pro", 19900, "month"),
    "pro_year": ("price_pro_year", "prod_streamforge_pro", 199000, "year"),
    "enterprise": ("price_enterprise", "prod_streamforge_enterprise", 99900, "month"),
    "support": ("price_support", "prod_streamforge_support", 52000, "year"),
    "minutes": ("price_minutes", "prod_streamforge_minutes", None, "month"),
}
OLD, BASIL = "2024-06-20", "2025-03-31.basil"


def epoch(text: str) -> int:
    """Seconds of an ISO time."""
    return int(datetime.fromisoformat(text).timestamp())


def subscription_item(number: int, part: dict[str, Any], of: dict[str, Any]) -> dict[str, Any]:
    """One item of the subscription `of`."""
    price_id, product, amount, interval = PRICES[part.get("price", "starter")]
    recurring = {"interval": interval, "interval_count": 1}
    recurring |= {"usage_type": part["usage_type"]} if "usage_type" in part else {}
    price = {"id": price_id, "object": "price", "currency": of.get("currency", "usd"), "product": product, "recurring": recurring}
    price |= {"unit_amount": amount} | {k: part[k] for k in ("unit_amount", "unit_amount_decimal") if k in part}
    found = {"id": f"si_{number}", "object": "subscription_item", "price": price}
    return found | ({"quantity": part.get("quantity", 1)} if part.get("usage_type") != "metered" else {})


def subscription(spec: dict[str, Any], shape: str) -> dict[str, Any]:
    """A subscription object; `spec`: id, customer, status, price (a name of PRICES), quantity and any further field.

    Or `items`: for each its price, quantity, usage_type and what its price has besides.
    """
    items = [subscription_item(i, part, spec) for i, part in enumerate(spec.get("items", [spec]), start=1)]
    item, price = items[0], items[0]["price"]
    found: dict[str, Any] = {
        "id": spec.get("id", "sub_1"),
        "object": "subscription",
        "customer": spec.get("customer", "cus_1"),
        "status": spec.get("status", "active"),
        "cancel_at_period_end": spec.get("cancel_at_period_end", False),
        "pause_collection": spec.get("pause_collection"),
        "currency": spec.get("currency", "usd"),
        "start_date": epoch(spec.get("start", "2026-01-01T00:00:00Z")),
        "items": {"object": "list", "data": items},
    }
    if shape == OLD:
        plan = {"id": price["id"], "object": "plan", "amount": price["unit_amount"], "product": price["product"]}
        found |= {"plan": plan | {"interval": price["recurring"]["interval"]}}
        found |= {"quantity": item.get("quantity"), "current_period_end": epoch("2026-02-01T00:00:00Z")}
    else:
        item["current_period_end"] = epoch("2026-02-01T00:00:00Z")
    return found


def event(spec: dict[str, Any]) -> dict[str, Any]:
    """An event: `spec` has type, at, and `subscription` or an object of tests/cases/money.py (short), or `object` (whole).

    Besides: id, previous, livemode, shape.
    """
    shape = spec.get("shape", BASIL)
    short = next((kind for kind in OBJECTS if kind in spec), None)
    if short:
        body = OBJECTS[short](spec[short], spec["at"], shape)
    else:
        body = spec["object"] if "object" in spec else subscription(spec.get("subscription", {}), shape)
    data: dict[str, Any] = {"object": body}
    if "previous" in spec:
        data["previous_attributes"] = spec["previous"]
    return {
        "id": spec.get("id", "evt_1"),
        "object": "event",
        "api_version": shape,
        "created": epoch(spec["at"]),
        "data": data,
        "livemode": spec.get("livemode", True),
        "pending_webhooks": spec.get("pending_webhooks", 1),
        "request": {"id": None, "idempotency_key": None},
        "type": spec.get("type", "customer.subscription.updated"),
        **({"account": spec["account"]} if "account" in spec else {}),
    }


def raw_row(spec: dict[str, Any], offset: int) -> dict[str, Any]:
    """A row of raw.stripe_events: an event in short, or `payload` as text; source, and `date` of the response."""
    payload = spec["payload"].encode() if "payload" in spec else json.dumps(event(spec)).encode()
    received = spec.get("received", spec.get("at", "2026-01-01T00:00:00Z"))
    return {
        "topic": "stripe",
        "partition": 0,
        "offset": offset,
        "payload": payload,
        "received_at": datetime.fromisoformat(received),
        "source": spec.get("source", "webhook"),
        "headers": [{"key": "date", "value": spec["date"].encode()}] if "date" in spec else [],
    }
