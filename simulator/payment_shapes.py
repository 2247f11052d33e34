"""Charges, payment intents, refunds and disputes as Stripe renders them, at two API versions.

With `2025-03-31.basil` charges and payment intents lost `invoice`; see `simulator.invoice_shapes`.
"""

from __future__ import annotations

from typing import Any

from simulator.chance import words
from simulator.shapes import Json, billing_details
from simulator.state import OLD_VERSION, Charge, Dispute, Intent, Refund

_EVIDENCE = words(
    "access_activity_log billing_address cancellation_policy cancellation_policy_disclosure cancellation_rebuttal "
    "customer_communication customer_email_address customer_name customer_purchase_ip customer_signature "
    "duplicate_charge_documentation duplicate_charge_explanation duplicate_charge_id product_description receipt "
    "refund_policy refund_policy_disclosure refund_refusal_explanation service_date service_documentation "
    "shipping_address shipping_carrier shipping_date shipping_documentation shipping_tracking_number "
    "uncategorized_file uncategorized_text"
)
_DAY = 86_400


def _outcome(charge: Charge, version: str) -> Json:
    if charge.succeeded:
        outcome: Json = {
            "network_status": "approved_by_network",
            "reason": None,
            "risk_level": "normal",
            "risk_score": charge.risk_score,
            "seller_message": "Payment complete.",
            "type": "authorized",
        }
    else:
        outcome = {
            "network_status": "declined_by_network",
            "reason": "insufficient_funds",
            "risk_level": "normal",
            "risk_score": charge.risk_score,
            "seller_message": "The bank returned the decline code `insufficient_funds`.",
            "type": "issuer_declined",
        }
    if version != OLD_VERSION:
        outcome |= {
            "advice_code": None if charge.succeeded else "try_again_later",
            "network_advice_code": None,
            "network_decline_code": None if charge.succeeded else "51",
        }
    return outcome


def render_charge(charge: Charge, version: str) -> Json:
    """A charge as it stands. Refunds are not expanded in it (since 2022-11-15)."""
    intent, card = charge.intent, charge.card
    invoice = intent.invoice
    customer = invoice.subscription.customer
    ok = charge.succeeded
    body: Json = {
        "id": charge.id,
        "object": "charge",
        "amount": intent.amount,
        "amount_captured": intent.amount if ok else 0,
        "amount_refunded": charge.refunded,
        "application": None,
        "application_fee": None,
        "application_fee_amount": None,
        "balance_transaction": charge.transaction if ok else None,
        "billing_details": billing_details(customer),
        "calculated_statement_descriptor": "STREAMFORGE",
        "captured": ok,
        "created": charge.created,
        "currency": customer.currency,
        "customer": customer.id,
        "description": _DESCRIPTION[invoice.reason],
        "destination": None,
        "disputed": charge.disputed,
        "failure_balance_transaction": None,
        "failure_code": None if ok else "card_declined",
        "failure_message": None if ok else "Your card has insufficient funds.",
        "fraud_details": {},
    }
    if version == OLD_VERSION:
        body["invoice"] = invoice.id
    return body | {
        "livemode": True,
        "metadata": {},
        "on_behalf_of": None,
        "outcome": _outcome(charge, version),
        "paid": ok,
        "payment_intent": intent.id,
        "payment_method": card.id,
        "payment_method_details": {
            "card": {
                "amount_authorized": intent.amount if ok else None,
                "authorization_code": None,
                "brand": card.brand,
                "checks": {"address_line1_check": "pass", "address_postal_code_check": "pass", "cvc_check": None},
                "country": card.country,
                "exp_month": card.exp_month,
                "exp_year": card.exp_year,
                "extended_authorization": {"status": "disabled"},
                "fingerprint": card.fingerprint,
                "funding": "credit",
                "incremental_authorization": {"status": "unavailable"},
                "installments": None,
                "last4": card.last4,
                "mandate": None,
                "multicapture": {"status": "unavailable"},
                "network": card.brand,
                "network_token": {"used": False},
                "overcapture": {"maximum_amount_capturable": intent.amount, "status": "unavailable"},
                "three_d_secure": None,
                "wallet": None,
            },
            "type": "card",
        },
        "receipt_email": None,
        "receipt_number": None,
        "receipt_url": f"https://pay.stripe.com/receipts/invoices/{charge.id[3:]}" if ok else None,
        "refunded": 0 < charge.refunded == intent.amount,
        "review": None,
        "shipping": None,
        "source": None,
        "source_transfer": None,
        "statement_descriptor": None,
        "statement_descriptor_suffix": None,
        "status": "succeeded" if ok else "failed",
        "transfer_data": None,
        "transfer_group": None,
    }


_DESCRIPTION = {
    "manual": "Usage",
    "subscription_create": "Subscription creation",
    "subscription_cycle": "Subscription update",
    "subscription_update": "Subscription update",
}


def render_intent(intent: Intent, version: str) -> Json:
    """A payment intent as it stands."""
    invoice, declined = intent.invoice, intent.declined
    customer = invoice.subscription.customer
    error: Json | None = None
    if declined is not None and intent.status == "requires_payment_method":
        error = {
            "charge": declined.id,
            "code": "card_declined",
            "decline_code": "insufficient_funds",
            "doc_url": "https://stripe.com/docs/error-codes/card-declined",
            "message": "Your card has insufficient funds.",
            "type": "card_error",
        }
    body: Json = {
        "id": intent.id,
        "object": "payment_intent",
        "amount": intent.amount,
        "amount_capturable": 0,
        "amount_details": {"tip": {}},
        "amount_received": intent.amount if intent.status == "succeeded" else 0,
        "application": None,
        "application_fee_amount": None,
        "automatic_payment_methods": None,
        "canceled_at": intent.canceled_at,
        "cancellation_reason": "void_invoice" if intent.canceled_at else None,
        "capture_method": "automatic",
        "client_secret": f"{intent.id}_secret_{intent.secret}",
        "confirmation_method": "automatic",
        "created": intent.created,
        "currency": customer.currency,
        "customer": customer.id,
        "description": _DESCRIPTION[invoice.reason],
    }
    if version == OLD_VERSION:
        body["invoice"] = invoice.id
    return body | {
        "last_payment_error": error,
        "latest_charge": intent.latest_charge.id if intent.latest_charge else None,
        "livemode": True,
        "metadata": {},
        "next_action": None,
        "on_behalf_of": None,
        "payment_method": customer.card.id if intent.status == "succeeded" else None,
        "payment_method_configuration_details": None,
        "payment_method_options": {"card": {"installments": None, "mandate_options": None, "network": None}},
        "payment_method_types": ["card"],
        "processing": None,
        "receipt_email": None,
        "review": None,
        "setup_future_usage": "off_session",
        "shipping": None,
        "source": None,
        "statement_descriptor": None,
        "statement_descriptor_suffix": None,
        "status": intent.status,
        "transfer_data": None,
        "transfer_group": None,
    }


def render_refund(refund: Refund) -> Json:
    """A refund as it stands; a failed one gives the money back to the balance."""
    failed = refund.status == "failed"
    body: Json = {
        "id": refund.id,
        "object": "refund",
        "amount": refund.amount,
        "balance_transaction": refund.transaction,
        "charge": refund.charge.id,
        "created": refund.created,
        "currency": refund.charge.intent.invoice.subscription.customer.currency,
        "destination_details": {
            "card": {"reference_status": "pending", "reference_type": "acquirer_reference_number", "type": "refund"},
            "type": "card",
        },
        "metadata": {},
        "payment_intent": refund.charge.intent.id,
        "reason": refund.reason,
        "receipt_number": None,
        "source_transfer_reversal": None,
        "status": refund.status,
        "transfer_reversal": None,
    }
    if failed:
        body |= {
            "failure_balance_transaction": refund.transaction.replace("txn_3", "txn_4"),
            "failure_reason": "lost_or_stolen_card",
        }
    return body


def render_dispute(dispute: Dispute, version: str) -> Json:
    """A dispute as it stands; `balance_transactions` holds what was withdrawn and reinstated."""
    charge = dispute.charge
    currency = charge.intent.invoice.subscription.customer.currency
    movements: list[Json] = [
        {
            "id": transaction,
            "object": "balance_transaction",
            "amount": amount,
            "available_on": at + 2 * _DAY,
            "created": at,
            "currency": currency,
            "description": f"Chargeback {'withdrawal' if amount < 0 else 'reversal'} for {charge.id}",
            "exchange_rate": None,
            "fee": fee,
            "fee_details": [
                {
                    "amount": fee,
                    "application": None,
                    "currency": currency,
                    "description": "Dispute fee",
                    "type": "stripe_fee",
                }
            ]
            if fee
            else [],
            "net": amount - fee,
            "reporting_category": "dispute" if amount < 0 else "dispute_reversal",
            "source": dispute.id,
            "status": "available",
            "type": "adjustment",
        }
        for transaction, amount, fee, at in dispute.movements
    ]
    evidence: dict[str, Any] = dict.fromkeys(_EVIDENCE)
    details: Json = {
        "due_by": dispute.created + 9 * _DAY,
        "has_evidence": dispute.has_evidence,
        "past_due": False,
        "submission_count": int(dispute.has_evidence),
    }
    body: Json = {
        "id": dispute.id,
        "object": "dispute",
        "amount": dispute.amount,
        "balance_transactions": movements,
        "charge": charge.id,
        "created": dispute.created,
        "currency": currency,
        "evidence": evidence,
        "evidence_details": details,
        "is_charge_refundable": dispute.status.startswith("warning"),
        "livemode": True,
        "metadata": {},
        "payment_intent": charge.intent.id,
        "payment_method_details": {
            "card": {"brand": charge.card.brand, "case_type": "chargeback", "network_reason_code": "10.4"},
            "type": "card",
        },
        "reason": dispute.reason,
        "status": dispute.status,
    }
    if dispute.status.startswith("warning"):
        body["payment_method_details"]["card"]["case_type"] = "inquiry"
    if version != OLD_VERSION:
        evidence["enhanced_evidence"] = {}
        details["enhanced_eligibility"] = {}
        body["enhanced_eligibility_types"] = []
    return body
