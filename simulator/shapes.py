"""Catalogue, customer and subscription objects as Stripe renders them, at two API versions.

`2024-06-20` is the last version before Acacia; `2025-03-31.basil` moved the period to the subscription's items and took the
subscription's top-level `plan`, `quantity` and `discount` away
(https://docs.stripe.com/changelog/basil/2025-03-31/deprecate-subscription-current-period-start-and-end).
Keys follow real payloads: Stripe's openapi fixtures for the new shape, recorded webhooks for the old.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simulator.catalogue import Price, Product
from simulator.state import OLD_VERSION, Customer, Subscription, SubscriptionState

Json = dict[str, Any]
ABSENT_ADDRESS = {"city": None, "country": None, "line1": None, "line2": None, "postal_code": None, "state": None}
_CATALOGUE_CREATED_BEFORE = 86_400 * 30  # the catalogue's objects are older than the world


def previous_attributes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Json:
    """The changed keys with their old values, as `data.previous_attributes` has them.

    Objects are compared key by key and only the changed keys kept; lists are given whole; a key that was absent is null.
    """
    changed: Json = {}
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        both = isinstance(before, dict) and isinstance(after, dict)
        changed[key] = previous_attributes(before, after) if both else before  # type: ignore[arg-type]
    return changed


def listing(rows: list[Json], url: str) -> Json:
    """A Stripe list object."""
    return {"object": "list", "data": rows, "has_more": False, "total_count": len(rows), "url": url}


def render_product(product: Product, created: int) -> Json:
    """A product object."""
    return {
        "id": product.id,
        "object": "product",
        "active": True,
        "created": created - _CATALOGUE_CREATED_BEFORE,
        "default_price": None,
        "description": product.description,
        "images": [],
        "livemode": True,
        "marketing_features": [],
        "metadata": {"plan": product.plan} if product.plan else {},
        "name": product.name,
        "package_dimensions": None,
        "shippable": None,
        "statement_descriptor": None,
        "tax_code": None,
        "type": "service",
        "unit_label": product.unit,
        "updated": created,
        "url": None,
    }


def render_price(price: Price, version: str, *, created: int = 0, livemode: bool = True) -> Json:
    """A price object (`recurring.aggregate_usage` went away with basil, `recurring.meter` came before it)."""
    recurring: Json | None = None
    if price.interval:
        recurring = {
            "aggregate_usage": None,
            "interval": price.interval,
            "interval_count": 1,
            "meter": None,
            "trial_period_days": None,
            "usage_type": "licensed",
        }
        if version != OLD_VERSION:
            del recurring["aggregate_usage"]
    return {
        "id": price.id,
        "object": "price",
        "active": True,
        "billing_scheme": "per_unit",
        "created": created,
        "currency": price.currency,
        "custom_unit_amount": None,
        "livemode": livemode,
        "lookup_key": price.id.removeprefix("price_"),
        "metadata": {},
        "nickname": None,
        "product": price.product_id,
        "recurring": recurring,
        "tax_behavior": "exclusive",
        "tiers_mode": None,
        "transform_quantity": None,
        "type": "recurring" if price.interval else "one_time",
        "unit_amount": price.unit_minor,
        "unit_amount_decimal": str(price.unit_minor),
    }


def render_plan(price: Price, version: str, *, livemode: bool = True) -> Json:
    """The legacy plan object that Stripe still renders beside a price."""
    plan: Json = {
        "id": price.id,
        "object": "plan",
        "active": True,
        "aggregate_usage": None,
        "amount": price.unit_minor,
        "amount_decimal": str(price.unit_minor),
        "billing_scheme": "per_unit",
        "created": 0,
        "currency": price.currency,
        "interval": price.interval,
        "interval_count": 1,
        "livemode": livemode,
        "metadata": {},
        "meter": None,
        "nickname": None,
        "product": price.product_id,
        "tiers_mode": None,
        "transform_usage": None,
        "trial_period_days": None,
        "usage_type": "licensed",
    }
    if version != OLD_VERSION:
        del plan["aggregate_usage"]
    return plan


def render_customer(customer: Customer) -> Json:
    """A customer object (both versions alike)."""
    state = customer.state
    return {
        "id": customer.id,
        "object": "customer",
        "address": dict(customer.person.address),
        "balance": 0,
        "created": customer.created,
        "currency": customer.currency,
        "default_source": None,
        "delinquent": state.delinquent,
        "description": None,
        "discount": None,
        "email": state.email,
        "invoice_prefix": customer.invoice_prefix,
        "invoice_settings": {
            "custom_fields": None,
            "default_payment_method": state.default_payment_method,
            "footer": None,
            "rendering_options": None,
        },
        "livemode": customer.livemode,
        "metadata": {},
        "name": state.name,
        "next_invoice_sequence": customer.invoices + 1,
        "phone": customer.person.phone,
        "preferred_locales": [],
        "shipping": None,
        "tax_exempt": "none",
        "test_clock": None,
    }


def render_payment_method(customer: Customer) -> Json:
    """The customer's card, as a payment method object."""
    card = customer.card
    return {
        "id": card.id,
        "object": "payment_method",
        "allow_redisplay": "unspecified",
        "billing_details": billing_details(customer),
        "card": {
            "brand": card.brand,
            "checks": {"address_line1_check": "pass", "address_postal_code_check": "pass", "cvc_check": "pass"},
            "country": card.country,
            "display_brand": card.brand,
            "exp_month": card.exp_month,
            "exp_year": card.exp_year,
            "fingerprint": card.fingerprint,
            "funding": "credit",
            "generated_from": None,
            "last4": card.last4,
            "networks": {"available": [card.brand], "preferred": None},
            "three_d_secure_usage": {"supported": True},
            "wallet": None,
        },
        "created": customer.created,
        "customer": customer.id,
        "livemode": customer.livemode,
        "metadata": {},
        "type": "card",
    }


def billing_details(customer: Customer) -> Json:
    """The `billing_details` of charges and payment methods."""
    return {
        "address": dict(customer.person.address),
        "email": customer.state.email,
        "name": customer.state.name,
        "phone": None,
        "tax_id": None,
    }


def _render_item(sub: Subscription, state: SubscriptionState, version: str) -> Json:
    livemode = sub.customer.livemode
    item: Json = {"id": sub.item_id, "object": "subscription_item", "billing_thresholds": None, "created": sub.created}
    if version != OLD_VERSION:
        item |= {"current_period_end": state.period_end, "current_period_start": state.period_start}
    return item | {
        "discounts": [],
        "metadata": {},
        "plan": render_plan(state.price, version, livemode=livemode),
        "price": render_price(state.price, version, livemode=livemode),
        "quantity": state.quantity,
        "subscription": sub.id,
        "tax_rates": [],
    }


def render_subscription(sub: Subscription, state: SubscriptionState, version: str) -> Json:
    """A subscription object in one of its states."""
    old = version == OLD_VERSION
    livemode = sub.customer.livemode
    body: Json = {
        "id": sub.id,
        "object": "subscription",
        "application": None,
        "application_fee_percent": None,
        "automatic_tax": {"enabled": False, "liability": None}
        if old
        else {"disabled_reason": None, "enabled": False, "liability": None},
        "billing_cycle_anchor": state.trial_end or sub.created,
        "billing_cycle_anchor_config": None,
        "billing_thresholds": None,
        "cancel_at": state.cancel_at,
        "cancel_at_period_end": state.cancel_at_period_end,
        "canceled_at": state.canceled_at,
        "cancellation_details": {"comment": None, "feedback": None, "reason": state.cancellation_reason},
        "collection_method": "charge_automatically",
        "created": sub.created,
        "currency": state.price.currency,
    }
    if old:
        body |= {"current_period_end": state.period_end, "current_period_start": state.period_start}
    body |= {
        "customer": sub.customer.id,
        "days_until_due": None,
        "default_payment_method": state.default_payment_method,
        "default_source": None,
        "default_tax_rates": [],
        "description": None,
    }
    if old:
        body["discount"] = None
    body |= {
        "discounts": [],
        "ended_at": state.ended_at,
        "invoice_settings": {"account_tax_ids": None, "issuer": {"type": "self"}},
        "items": listing([_render_item(sub, state, version)], f"/v1/subscription_items?subscription={sub.id}"),
        "latest_invoice": state.latest_invoice,
        "livemode": livemode,
        "metadata": {} if state.purchase_order is None else {"purchase_order": state.purchase_order},
        "next_pending_invoice_item_invoice": None,
        "on_behalf_of": None,
        "pause_collection": {"behavior": state.pause_behavior, "resumes_at": None} if state.pause_behavior else None,
        "payment_settings": {
            "payment_method_options": None,
            "payment_method_types": None,
            "save_default_payment_method": "off",
        },
        "pending_invoice_item_interval": None,
        "pending_setup_intent": None,
        "pending_update": None,
    }
    if old:
        body |= {"plan": render_plan(state.price, version, livemode=livemode), "quantity": state.quantity}
    return body | {
        "schedule": None,
        "start_date": sub.created,
        "status": state.status,
        "test_clock": None,
        "transfer_data": None,
        "trial_end": state.trial_end,
        "trial_settings": {"end_behavior": {"missing_payment_method": "pause"}},
        "trial_start": state.trial_start,
    }
