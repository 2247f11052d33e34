"""The facts of the world: customers, subscriptions, invoices, payments. Times are epoch seconds (int), amounts minor units."""

from __future__ import annotations

from dataclasses import dataclass, field

from simulator.catalogue import Price
from simulator.people import Card, Person

OLD_VERSION = "2024-06-20"
NEW_VERSION = "2025-03-31.basil"


@dataclass(frozen=True, slots=True)
class CustomerState:
    """What can change about a customer."""

    email: str
    name: str
    delinquent: bool = False
    default_payment_method: str | None = None


@dataclass(slots=True)
class Customer:
    """A Stripe customer and its present state."""

    id: str
    person: Person
    card: Card
    created: int
    currency: str
    invoice_prefix: str
    state: CustomerState
    invoices: int = 0
    livemode: bool = True


@dataclass(frozen=True, slots=True)
class SubscriptionState:
    """Everything about a subscription that can change."""

    status: str
    price: Price
    quantity: int
    period_start: int
    period_end: int
    latest_invoice: str | None = None
    cancel_at_period_end: bool = False
    cancel_at: int | None = None
    canceled_at: int | None = None
    ended_at: int | None = None
    cancellation_reason: str | None = None
    pause_behavior: str | None = None
    trial_start: int | None = None
    trial_end: int | None = None
    default_payment_method: str | None = None
    purchase_order: str | None = None

    @property
    def alive(self) -> bool:
        """Not ended."""
        return self.status not in ("canceled", "incomplete_expired")


@dataclass(slots=True)
class Subscription:
    """A subscription and the states it went through, in true order (several may share a second)."""

    id: str
    item_id: str
    customer: Customer
    created: int
    states: list[tuple[int, SubscriptionState]] = field(default_factory=list)

    @property
    def now(self) -> SubscriptionState:
        """The last state so far."""
        return self.states[-1][1]


@dataclass(frozen=True, slots=True)
class Line:
    """An invoice line. `amount` is signed: a credit for unused time is negative. `item`: of an invoice item, the item's id."""

    id: str
    amount: int
    description: str
    price: Price
    quantity: int
    start: int
    end: int
    proration: bool
    item: str | None = None


@dataclass(slots=True)
class Invoice:
    """An invoice; one payment intent and one charge per attempt belong to it. `due`: when it is to be paid, if it was sent."""

    id: str
    number: str
    subscription: Subscription
    reason: str
    created: int
    lines: list[Line]
    period_start: int
    period_end: int
    due: int | None = None
    status: str = "draft"
    attempt_count: int = 0
    next_attempt: int | None = None
    finalized_at: int | None = None
    paid_at: int | None = None
    voided_at: int | None = None
    uncollectible_at: int | None = None
    intent: Intent | None = None

    @property
    def total(self) -> int:
        """Sum of the lines."""
        return sum(line.amount for line in self.lines)


@dataclass(slots=True)
class Intent:
    """A payment intent."""

    id: str
    secret: str
    invoice: Invoice
    amount: int
    created: int
    status: str = "requires_payment_method"
    latest_charge: Charge | None = None
    declined: Charge | None = None
    canceled_at: int | None = None


@dataclass(slots=True)
class Charge:
    """One attempt to take the money."""

    id: str
    transaction: str
    intent: Intent
    card: Card
    created: int
    succeeded: bool
    risk_score: int
    refunded: int = 0
    disputed: bool = False


@dataclass(slots=True)
class Refund:
    """A refund of a charge, whole or part."""

    id: str
    transaction: str
    charge: Charge
    amount: int
    reason: str | None
    created: int
    status: str = "succeeded"


@dataclass(slots=True)
class Dispute:
    """A dispute; `movements` are (balance transaction, signed amount, fee, at)."""

    id: str
    charge: Charge
    amount: int
    reason: str
    status: str
    created: int
    has_evidence: bool = False
    movements: list[tuple[str, int, int, int]] = field(default_factory=list)
