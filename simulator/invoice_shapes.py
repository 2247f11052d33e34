"""Invoices as Stripe renders them, at two API versions.

With `2025-03-31.basil` an invoice's subscription moved under `parent`, its lines got `parent` and `pricing`, and it lost
`charge`, `payment_intent` and `paid`: from then on `invoice_payment` objects join it to its payments
(https://docs.stripe.com/changelog/basil/2025-03-31/add-support-for-multiple-partial-payments-on-invoices).
"""

from __future__ import annotations

from simulator.shapes import Json, listing, render_plan, render_price
from simulator.state import OLD_VERSION, Invoice, Line


def _line(line: Line, invoice: Invoice, version: str) -> Json:
    sub = invoice.subscription
    body: Json = {
        "id": line.id,
        "object": "line_item",
        "amount": line.amount,
        "currency": line.price.currency,
        "description": line.description,
        "discount_amounts": [],
        "discountable": not line.proration,
        "discounts": [],
        "invoice": invoice.id,
        "livemode": True,
        "metadata": {},
        "period": {"end": line.end, "start": line.start},
        "quantity": line.quantity,
    }
    if version == OLD_VERSION:
        body |= {
            "amount_excluding_tax": line.amount,
            "price": render_price(line.price, version),
            "proration": line.proration,
            "proration_details": {"credited_items": None},
            "subscription": sub.id,
            "tax_amounts": [],
            "tax_rates": [],
            "unit_amount_excluding_tax": str(line.amount // line.quantity),
        }
        if line.item:
            return body | {"invoice_item": line.item, "plan": None, "type": "invoiceitem"}
        return body | {"plan": render_plan(line.price, version), "subscription_item": sub.item_id, "type": "subscription"}
    details = {"proration": line.proration, "proration_details": {"credited_items": None}, "subscription": sub.id}
    item = details | {"invoice_item": line.item} if line.item else None
    return body | {
        "parent": {
            "invoice_item_details": item,
            "subscription_item_details": None if item else details | {"invoice_item": None, "subscription_item": sub.item_id},
            "type": "invoice_item_details" if item else "subscription_item_details",
        },
        "pretax_credit_amounts": [],
        "pricing": {
            "price_details": {"price": line.price.id, "product": line.price.product_id},
            "type": "price_details",
            "unit_amount_decimal": str(line.price.unit_minor),
        },
        "taxes": [],
    }


def render_invoice(invoice: Invoice, version: str) -> Json:
    """An invoice as it stands. Its amounts agree: lines = total = paid + remaining."""
    sub = invoice.subscription
    customer, total, paid = sub.customer, invoice.total, invoice.status == "paid"
    intent = invoice.intent
    final = invoice.finalized_at is not None
    url = f"https://invoice.stripe.com/i/acct_streamforge/live_{invoice.id[3:]}" if final else None
    body: Json = {
        "id": invoice.id,
        "object": "invoice",
        "account_country": "US",
        "account_name": "StreamForge, Inc.",
        "account_tax_ids": None,
        "amount_due": total,
        "amount_paid": total if paid else 0,
        "amount_remaining": 0 if paid else total,
        "amount_shipping": 0,
        "application": None,
        "attempt_count": invoice.attempt_count,
        "attempted": invoice.attempt_count > 0 or paid,
        "auto_advance": invoice.status in ("draft", "open"),
        "automatic_tax": {"enabled": False, "liability": None, "status": None},
        "automatically_finalizes_at": invoice.created + 3600 if invoice.status == "draft" else None,
        "billing_reason": invoice.reason,
        "collection_method": "send_invoice" if invoice.due else "charge_automatically",
        "created": invoice.created,
        "currency": customer.currency,
        "custom_fields": None,
        "customer": customer.id,
        "customer_address": dict(customer.person.address),
        "customer_email": customer.state.email,
        "customer_name": customer.state.name,
        "customer_phone": customer.person.phone,
        "customer_shipping": None,
        "customer_tax_exempt": "none",
        "customer_tax_ids": [],
        "default_payment_method": None,
        "default_source": None,
        "default_tax_rates": [],
        "description": None,
        "discounts": [],
        "due_date": invoice.due,
        "effective_at": invoice.finalized_at,
        "ending_balance": 0 if final else None,
        "footer": None,
        "from_invoice": None,
        "hosted_invoice_url": url,
        "invoice_pdf": f"{url}/pdf" if url else None,
        "issuer": {"type": "self"},
        "last_finalization_error": None,
        "latest_revision": None,
        "lines": listing([_line(line, invoice, version) for line in invoice.lines], f"/v1/invoices/{invoice.id}/lines"),
        "livemode": True,
        "metadata": {},
        "next_payment_attempt": invoice.next_attempt,
        "number": invoice.number if final else None,
        "on_behalf_of": None,
        "payment_settings": {
            "default_mandate": None,
            "payment_method_options": None,
            "payment_method_types": None,
        },
        "period_end": invoice.period_end,
        "period_start": invoice.period_start,
        "post_payment_credit_notes_amount": 0,
        "pre_payment_credit_notes_amount": 0,
        "receipt_number": None,
        "rendering": None,
        "shipping_cost": None,
        "shipping_details": None,
        "starting_balance": 0,
        "statement_descriptor": None,
        "status": invoice.status,
        "status_transitions": {
            "finalized_at": invoice.finalized_at,
            "marked_uncollectible_at": invoice.uncollectible_at,
            "paid_at": invoice.paid_at,
            "voided_at": invoice.voided_at,
        },
        "subtotal": total,
        "subtotal_excluding_tax": total,
        "test_clock": None,
        "total": total,
        "total_discount_amounts": [],
        "total_excluding_tax": total,
        "webhooks_delivered_at": invoice.created,
    }
    if version == OLD_VERSION:
        return body | {
            "application_fee_amount": None,
            "charge": intent.latest_charge.id if intent and intent.latest_charge else None,
            "discount": None,
            "paid": paid,
            "paid_out_of_band": False,
            "payment_intent": intent.id if intent else None,
            "quote": None,
            "subscription": sub.id,
            "subscription_details": {"metadata": {}},
            "tax": None,
            "total_tax_amounts": [],
            "transfer_data": None,
        }
    body["automatic_tax"] = {"disabled_reason": None, "enabled": False, "liability": None, "provider": None, "status": None}
    return body | {
        "amount_overpaid": 0,
        "parent": {
            "quote_details": None,
            "subscription_details": {"metadata": {}, "subscription": sub.id},
            "type": "subscription_details",
        },
        "total_pretax_credit_amounts": [],
        "total_taxes": [],
    }


def render_invoice_payment(invoice: Invoice, payment_id: str) -> Json:
    """The link from an invoice to its payment intent (basil and later)."""
    intent = invoice.intent
    assert intent is not None
    return {
        "id": payment_id,
        "object": "invoice_payment",
        "amount_paid": invoice.total,
        "amount_requested": invoice.total,
        "created": intent.created,
        "currency": invoice.subscription.customer.currency,
        "invoice": invoice.id,
        "is_default": True,
        "livemode": True,
        "payment": {"payment_intent": intent.id, "type": "payment_intent"},
        "status": "paid",
        "status_transitions": {"canceled_at": None, "paid_at": invoice.paid_at},
    }
