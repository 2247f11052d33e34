"""Small random worlds of Stripe events, each in an account of its own, so that one call of a transform judges thousands."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from tests.cases.stripe import BASIL, OLD, PRICES
from transforms.pure import DELIVERIES

START = datetime(2026, 1, 1, tzinfo=UTC)
STATUSES = ("trialing", "active", "past_due", "unpaid", "canceled", "paused")


@dataclass(frozen=True)
class Delivery:
    """One webhook as received, with its coordinates."""

    body: bytes
    received_at: datetime
    partition: int
    offset: int


def _item(item_id: str, price: str, quantity: int, shape: str) -> dict[str, Any]:
    price_id, product, amount, interval = PRICES[price]
    found = {
        "id": item_id,
        "object": "subscription_item",
        "quantity": quantity,
        "price": {
            "id": price_id,
            "product": product,
            "unit_amount": amount,
            "currency": "usd",
            "recurring": {"interval": interval},
        },
    }
    return found | ({"current_period_end": 1_769_904_000} if shape == BASIL else {})


def _subscription(state: dict[str, Any], shape: str) -> dict[str, Any]:
    """A subscription as an API version renders it."""
    items = [_item("si_1", state["price"], state["quantity"], shape)]
    if state["add_on"]:
        items.append(_item("si_2", "starter", 1, shape))
    found = {k: state[k] for k in ("id", "customer", "status", "cancel_at_period_end", "pause_collection")}
    found |= {"object": "subscription", "items": {"object": "list", "data": items}}
    return found | ({"quantity": state["quantity"], "current_period_end": 1_769_904_000} if shape == OLD else {})


def _previous(old: dict[str, Any], new: dict[str, Any], shape: str) -> dict[str, Any]:
    """What an update says of before: the attributes that changed, in the shape of the same version."""
    a, b = _subscription(old, shape), _subscription(new, shape)
    return {k: a[k] for k in a if a[k] != b[k]}


def _charge(state: dict[str, Any], shape: str) -> dict[str, Any]:
    found: dict[str, Any] = {k: state[k] for k in ("id", "customer", "amount", "amount_refunded")}
    found |= {"object": "charge", "status": "succeeded", "currency": "jpy", "captured": True}
    if shape == OLD:
        found["refunds"] = {"data": [_refund(state, r, a, "succeeded") for r, a in state["refunds"]]}
    return found


def _refund(charge: dict[str, Any], refund_id: str, amount: int, status: str) -> dict[str, Any]:
    found = {"id": refund_id, "object": "refund", "amount": amount, "status": status, "currency": "jpy"}
    return found | {"charge": charge["id"]}


def _more_money(charge: dict[str, Any], invoice: dict[str, Any], name: str, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """What an event that does not belong to a chain of changes says of money: its type and object."""
    refund, dispute, note = (f"{kind}_{name}_{rng.randrange(2)}" for kind in ("re", "dp", "cn"))
    return rng.choice(
        [
            ("charge.succeeded", _charge(charge, BASIL)),
            ("refund.created", _refund(charge, refund, 50, "succeeded")),
            ("refund.failed", _refund(charge, refund, 50, "failed")),
            (
                "charge.dispute.funds_withdrawn",
                {"id": dispute, "object": "dispute", "charge": charge["id"], "amount": 300, "currency": "jpy"}
                | {"balance_transactions": [_moved(dispute, -300)]},
            ),
            ("invoice.finalized", dict(invoice)),
            ("invoice.voided", invoice | {"status": "void"}),
            (
                "credit_note.created",
                {"id": note, "object": "credit_note", "invoice": invoice["id"], "customer": invoice["customer"]}
                | {"currency": "jpy", "total": 70, "status": "issued", "created": int(START.timestamp())},
            ),
        ]
    )


def _moved(dispute: str, amount: int) -> dict[str, Any]:
    found = {"id": f"txn_{dispute}", "object": "balance_transaction", "source": dispute, "amount": amount, "fee": 15}
    return found | {"currency": "jpy", "created": int(START.timestamp())}


def events_of(account: str, rng: random.Random) -> list[dict[str, Any]]:
    """The events of one world, in true order; often several of one object in a second."""
    ids = iter(rng.sample(range(1000), 60))
    sub = {"id": f"sub_{account}", "customer": f"cus_{account}", "status": "trialing", "price": "starter", "quantity": 1}
    sub |= {"cancel_at_period_end": False, "pause_collection": None, "add_on": False}
    customer: dict[str, Any] = {"id": f"cus_{account}", "object": "customer", "email": "a@example.com", "delinquent": False}
    charge: dict[str, Any] = {
        "id": f"ch_{account}",
        "customer": f"cus_{account}",
        "amount": 900,
        "amount_refunded": 0,
        "refunds": [],
    }
    invoice: dict[str, Any] = {"id": f"in_{account}", "object": "invoice", "customer": f"cus_{account}", "status": "open"}
    invoice |= {"currency": "jpy", "total": 900, "status_transitions": {"finalized_at": int(START.timestamp())}}
    moment, found = int(START.timestamp()), []

    def say(kind: str, obj: dict[str, Any], shape: str, previous: dict[str, Any] | None = None) -> None:
        data = {"object": obj} | ({} if previous is None else {"previous_attributes": previous})
        found.append(
            {"id": f"evt_{next(ids)}", "object": "event", "type": kind, "created": moment, "api_version": shape}
            | {"account": account, "livemode": rng.random() > 0.03, "data": data}
        )

    say("customer.created", dict(customer), OLD)
    say("customer.subscription.created", _subscription(sub, OLD), OLD)
    for _ in range(rng.randint(2, 12)):
        moment += rng.choice([0, 0, 1, 3600])
        shape = rng.choice([OLD, BASIL])
        what = rng.random()
        if what < 0.6:
            new = sub | rng.choice(
                [
                    {"status": rng.choice(STATUSES)},
                    {"quantity": rng.randint(1, 3)},
                    {"price": rng.choice(["starter", "pro"]), "quantity": rng.randint(1, 3)},
                    {"cancel_at_period_end": rng.random() < 0.5},
                    {"pause_collection": rng.choice([None, {"behavior": "void"}])},
                    {"add_on": rng.random() < 0.5},
                ]
            )
            say("customer.subscription.updated", _subscription(new, shape), shape, _previous(sub, new, shape))
            sub = new
        elif what < 0.75:
            changed = rng.choice([{"email": rng.choice(["a@example.com", "b@example.com"])}, {"delinquent": rng.random() < 0.5}])
            previous = {k: customer[k] for k, v in changed.items() if customer[k] != v}
            customer |= changed
            say("customer.updated", dict(customer), shape, rng.choice([previous, previous, None]))
        elif what < 0.8:
            say("customer.deleted", {"id": customer["id"], "object": "customer", "deleted": True}, shape)
        elif what < 0.9:
            kind, obj = _more_money(charge, invoice, account, rng)
            say(kind, obj, shape)
        else:
            part = rng.choice([100, 200])
            before = charge["amount_refunded"]
            charge |= {"amount_refunded": before + part, "refunds": [*charge["refunds"], (f"re_{next(ids)}_{account}", part)]}
            say("charge.refunded", _charge(charge, shape), shape, {"amount_refunded": before})
    return found


def deliveries_of(worlds: int, seed: int) -> list[Delivery]:
    """What is received of that many worlds: each event at least once, with its first receipt; late by seconds or weeks."""
    rng = random.Random(seed)
    found = []
    for n in range(worlds):
        for event in events_of(f"acct_{seed}_{n}", rng):
            late = rng.choice([1, 2, 30, 86_400 * 20])
            at = datetime.fromtimestamp(event["created"], UTC) + timedelta(seconds=late, microseconds=rng.randint(0, 999_999))
            found.append(Delivery(json.dumps(event).encode(), at, rng.randint(0, 2), len(found)))
    return found


def repeated(received: list[Delivery], rng: random.Random, share: float = 0.3) -> list[Delivery]:
    """The deliveries and repeats of some of them, received later, in any order."""
    again = [
        replace(d, received_at=d.received_at + timedelta(seconds=rng.randint(0, 10**6)), offset=len(received) + i)
        for i, d in enumerate(rng.sample(received, int(len(received) * share)))
    ]
    return rng.sample([*received, *again], len(received) + len(again))


def redated(received: list[Delivery], rng: random.Random, share: float = 0.2) -> list[Delivery]:
    """The deliveries and, of some events, a copy that says another `created`, received before or after it; in any order."""
    again = []
    for i, d in enumerate(rng.sample(received, int(len(received) * share))):
        event = json.loads(d.body)
        event["created"] += rng.choice([-7200, -1, 1, 7200])
        moved = timedelta(seconds=rng.choice([-(10**4), 10**4]), microseconds=rng.randint(0, 999_999))
        again.append(Delivery(json.dumps(event).encode(), d.received_at + moved, rng.randint(0, 2), len(received) + i))
    return rng.sample([*received, *again], len(received) + len(again))


def as_rows(received: list[Delivery]) -> pa.Table:
    """Deliveries as rows of raw.stripe_events."""
    n = len(received)
    return pa.table(
        [
            ["stripe"] * n,
            [d.partition for d in received],
            [d.offset for d in received],
            [[]] * n,
            [d.body for d in received],
            [d.received_at for d in received],
            ["webhook"] * n,
        ],
        schema=DELIVERIES,
    )
