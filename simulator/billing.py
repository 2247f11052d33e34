"""What happens to money: invoices, payment attempts, refunds and disputes, each told as Stripe's events."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from simulator.catalogue import Price
from simulator.chance import base62
from simulator.events import EventLog, Money
from simulator.invoice_shapes import render_invoice, render_invoice_payment
from simulator.payment_shapes import (
    render_charge,
    render_dispute,
    render_intent,
    render_refund,
)
from simulator.shapes import previous_attributes, render_customer, render_subscription
from simulator.state import (
    NEW_VERSION,
    Charge,
    Customer,
    Dispute,
    Intent,
    Invoice,
    Line,
    Refund,
    Subscription,
    SubscriptionState,
)

DISPUTE_FEE = 1_500
UPDATED, DELETED = "customer.subscription.updated", "customer.subscription.deleted"


@dataclass(slots=True)
class Desk:
    """Where one customer's facts are written down: the event log and the customer's own chance."""

    log: EventLog
    rng: Random

    def new_id(self, prefix: str) -> str:
        """An id as Stripe's: prefix and 24 characters."""
        return f"{prefix}_{base62(self.rng, 24)}"


def change_subscription(desk: Desk, sub: Subscription, at: int, *, asked: bool = False, **changes: Any) -> bool:
    """Change a subscription at second `at` (not before its last change) and tell it; False past the horizon.

    The event is `customer.subscription.deleted` when the status becomes canceled, else `...updated` with
    `previous_attributes`.
    """
    at = max(at, sub.states[-1][0])
    if at >= desk.log.horizon:
        return False
    old, new = sub.now, replace(sub.now, **changes)
    sub.states.append((at, new))
    version = desk.log.version(at)
    body = render_subscription(sub, new, version)
    if new.status == "canceled":
        desk.log.add(at, DELETED, body, asked=asked)
    else:
        previous = previous_attributes(render_subscription(sub, old, version), body)
        desk.log.add(at, UPDATED, body, previous, asked=asked)
    return True


def tell_subscription(desk: Desk, sub: Subscription, at: int, kind: str, *, asked: bool = False) -> None:
    """An event about a subscription that changes nothing in it (created, paused, resumed, trial_will_end)."""
    desk.log.add(at, kind, render_subscription(sub, sub.now, desk.log.version(at)), asked=asked)


def change_customer(desk: Desk, customer: Customer, at: int, *, asked: bool = False, **changes: Any) -> None:
    """Change a customer and tell it; nothing when nothing changes."""
    old = render_customer(customer)
    customer.state = replace(customer.state, **changes)
    new = render_customer(customer)
    if old != new:
        desk.log.add(at, "customer.updated", new, previous_attributes(old, new), asked=asked)


def period_line(desk: Desk, state: SubscriptionState, amount: int) -> Line:
    """The line for a whole period (`amount` 0 for a trial)."""
    name = state.price.plan.capitalize()
    text = f"{state.quantity} × StreamForge {name} (at {state.price.unit_minor / 100:.2f} / {state.price.interval})"
    price, quantity = state.price, state.quantity
    return Line(desk.new_id("il"), amount, text, price, quantity, state.period_start, state.period_end, False)


def proration_lines(desk: Desk, at: int, old: SubscriptionState, price: Price, quantity: int) -> list[Line]:
    """Credit for the unused time and charge for the remaining time, both from `at` to the end of the period."""
    left = old.period_end - at
    whole = old.period_end - old.period_start
    credit = -(old.price.unit_minor * old.quantity * left // whole)
    debit = price.unit_minor * quantity * left // whole
    return [
        Line(
            desk.new_id("il"),
            credit,
            f"Unused time on {old.quantity} × {old.price.plan}",
            old.price,
            old.quantity,
            at,
            old.period_end,
            True,
        ),
        Line(
            desk.new_id("il"),
            debit,
            f"Remaining time on {quantity} × {price.plan}",
            price,
            quantity,
            at,
            old.period_end,
            True,
        ),
    ]


def draft_invoice(desk: Desk, sub: Subscription, at: int, reason: str, lines: list[Line], start: int) -> Invoice:
    """A draft, not told yet. `start`: start of the period that the invoice closes (it ends at `at`)."""
    customer = sub.customer
    customer.invoices += 1
    number = f"{customer.invoice_prefix}-{customer.invoices:04d}"
    return Invoice(desk.new_id("in"), number, sub, reason, at, lines, start, at)


def tell_invoice(desk: Desk, invoice: Invoice, at: int, kind: str) -> None:
    """Tell an invoice as it stands."""
    desk.log.add(at, kind, render_invoice(invoice, desk.log.version(at)))


def bill(desk: Desk, invoice: Invoice, at: int, kind: str, amount: int) -> None:
    """Book what an invoice adds to (or takes from) what was billed; before it is told."""
    assert invoice.finalized_at is not None
    customer = invoice.subscription.customer
    at_order = at, invoice.finalized_at, len(desk.log.events)
    desk.log.book(Money("billed", kind, invoice.id, invoice.id, customer.id, customer.currency, amount, *at_order))


def move(desk: Desk, charge: Charge, at: int, kind: str, object_id: str, amount: int) -> None:
    """Book cash that comes or goes because of a charge; before it is told."""
    customer = charge.intent.invoice.subscription.customer
    at_order = at, charge.created, len(desk.log.events)
    desk.log.book(Money("cash", kind, object_id, charge.id, customer.id, customer.currency, amount, *at_order))


def finalize(desk: Desk, invoice: Invoice, at: int) -> None:
    """Finalize: the amounts are fixed and a payment intent exists; an invoice over nothing is paid at once."""
    invoice.status, invoice.finalized_at = "open", at
    if invoice.total > 0:
        intent = Intent(desk.new_id("pi"), base62(desk.rng, 24), invoice, invoice.total, at)
        invoice.intent = intent
        desk.log.add(at, "payment_intent.created", render_intent(intent, desk.log.version(at)))
    bill(desk, invoice, at, "invoice", invoice.total)
    tell_invoice(desk, invoice, at, "invoice.finalized")
    if invoice.total == 0:
        invoice.status, invoice.paid_at = "paid", at
        tell_invoice(desk, invoice, at, "invoice.paid")
        tell_invoice(desk, invoice, at, "invoice.payment_succeeded")


def attempt(desk: Desk, invoice: Invoice, at: int, *, succeeds: bool, next_attempt: int | None = None) -> Charge:
    """Try to take the money of an open invoice, within one second."""
    intent = invoice.intent
    assert intent is not None
    version, log = desk.log.version(at), desk.log
    charge_id, transaction = f"ch_3{base62(desk.rng, 23)}", f"txn_3{base62(desk.rng, 23)}"
    card = invoice.subscription.customer.card
    charge = Charge(charge_id, transaction, intent, card, at, succeeds, desk.rng.randint(1, 60))
    intent.latest_charge = charge
    invoice.attempt_count += 1
    if succeeds:
        intent.status, invoice.status, invoice.paid_at, invoice.next_attempt = "succeeded", "paid", at, None
        move(desk, charge, at, "charge", charge.id, intent.amount)
        log.add(at, "charge.succeeded", render_charge(charge, version))
        log.add(at, "payment_intent.succeeded", render_intent(intent, version))
        tell_invoice(desk, invoice, at, "invoice.paid")
        tell_invoice(desk, invoice, at, "invoice.payment_succeeded")
        if version == NEW_VERSION:
            log.add(at, "invoice_payment.paid", render_invoice_payment(invoice, desk.new_id("inpay")))
    else:
        intent.declined, invoice.next_attempt = charge, next_attempt
        log.add(at, "charge.failed", render_charge(charge, version))
        log.add(at, "payment_intent.payment_failed", render_intent(intent, version))
        tell_invoice(desk, invoice, at, "invoice.payment_failed")
    return charge


def give_up(desk: Desk, invoice: Invoice, at: int, *, void: bool) -> None:
    """Void an open invoice, or mark it uncollectible."""
    invoice.next_attempt = None
    if void:
        invoice.status, invoice.voided_at = "void", at
        if invoice.intent is not None:
            invoice.intent.status, invoice.intent.canceled_at = "canceled", at
            desk.log.add(at, "payment_intent.canceled", render_intent(invoice.intent, desk.log.version(at)))
        bill(desk, invoice, at, "invoice_voided", -invoice.total)
        tell_invoice(desk, invoice, at, "invoice.voided")
    else:
        invoice.status, invoice.uncollectible_at = "uncollectible", at
        bill(desk, invoice, at, "invoice_uncollectible", -invoice.total)
        tell_invoice(desk, invoice, at, "invoice.marked_uncollectible")


def refund(desk: Desk, charge: Charge, at: int, amount: int, reason: str | None) -> Refund:
    """Give back `amount` of a charge: `refund.created`, `charge.refunded`."""
    version = desk.log.version(at)
    made = Refund(f"re_3{base62(desk.rng, 23)}", f"txn_3{base62(desk.rng, 23)}", charge, amount, reason, at)
    before = render_charge(charge, version)
    charge.refunded += amount
    after = render_charge(charge, version)
    move(desk, charge, at, "refund", made.id, -amount)
    desk.log.add(at, "refund.created", render_refund(made), asked=True)
    desk.log.add(at, "charge.refunded", after, previous_attributes(before, after), asked=True)
    return made


def fail_refund(desk: Desk, made: Refund, at: int) -> None:
    """The bank sends a refund back: `refund.updated`, `refund.failed`, and the charge is less refunded."""
    version = desk.log.version(at)
    before = render_charge(made.charge, version)
    old = render_refund(made)
    made.status = "failed"
    made.charge.refunded -= made.amount
    move(desk, made.charge, at, "refund_failed", made.id, made.amount)
    after, new = render_charge(made.charge, version), render_refund(made)
    desk.log.add(at, "refund.updated", new, previous_attributes(old, new))
    desk.log.add(at, "refund.failed", new)
    desk.log.add(at, "charge.updated", after, previous_attributes(before, after))


def open_dispute(desk: Desk, charge: Charge, at: int, *, inquiry: bool) -> Dispute:
    """A cardholder complains. An inquiry moves no money; a chargeback withdraws the amount and a fee at once."""
    reason = desk.rng.choice(("fraudulent", "product_not_received", "subscription_canceled"))
    status = "warning_needs_response" if inquiry else "needs_response"
    made = Dispute(desk.new_id("dp"), charge, charge.intent.amount - charge.refunded, reason, status, at)
    version = desk.log.version(at)
    if not inquiry:
        made.movements.append((f"txn_1{base62(desk.rng, 23)}", -made.amount, DISPUTE_FEE, at))
        move(desk, charge, at, "dispute_withdrawn", made.id, -made.amount)
        move(desk, charge, at, "dispute_fee", made.id, -DISPUTE_FEE)
        charge.disputed = True
    desk.log.add(at, "charge.dispute.created", render_dispute(made, version))
    if not inquiry:
        desk.log.add(at, "charge.dispute.funds_withdrawn", render_dispute(made, version))
    return made


def answer_dispute(desk: Desk, made: Dispute, at: int) -> None:
    """Evidence is handed in: the dispute goes under review."""
    version = desk.log.version(at)
    before = render_dispute(made, version)
    made.has_evidence = True
    made.status = "warning_under_review" if made.status.startswith("warning") else "under_review"
    after = render_dispute(made, version)
    desk.log.add(at, "charge.dispute.updated", after, previous_attributes(before, after), asked=True)


def close_dispute(desk: Desk, made: Dispute, at: int, *, won: bool) -> None:
    """The bank decides; a won chargeback gives the amount back (not the fee)."""
    version = desk.log.version(at)
    before = render_dispute(made, version)
    inquiry = made.status.startswith("warning")
    made.status = "warning_closed" if inquiry else "won" if won else "lost"
    if won and not inquiry:
        made.movements.append((f"txn_1{base62(desk.rng, 23)}", made.amount, 0, at))
        move(desk, made.charge, at, "dispute_reinstated", made.id, made.amount)
    after = render_dispute(made, version)
    desk.log.add(at, "charge.dispute.closed", after, {"status": before["status"]})
    if won and not inquiry:
        desk.log.add(at, "charge.dispute.funds_reinstated", after)
