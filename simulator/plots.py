"""What can happen to an active subscription: the plots of a life, each a function of (life, second, subscription)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from simulator import billing
from simulator.billing import change_subscription, finalize
from simulator.catalogue import PLANS, PRICES, price_id
from simulator.chance import base62
from simulator.lives import Life, Plot, next_period
from simulator.shapes import render_customer
from simulator.state import Subscription


def _plan_beside(sub: Subscription, step: int) -> str:
    """The plan one step above (or below); at the end of the ladder the one on the other side."""
    rank = PLANS.index(sub.now.price.plan)
    other = rank + step
    return PLANS[other if 0 <= other < len(PLANS) else rank - step]


def upgrade(life: Life, at: int, sub: Subscription) -> None:
    """To the next plan, the difference invoiced at once; on the highest plan, more seats."""
    if sub.now.price.plan == PLANS[-1]:
        buy_seats(life, at, sub, "paid")
        return
    price = PRICES[price_id(_plan_beside(sub, 1), sub.now.price.interval, life.customer.currency)]
    lines = billing.proration_lines(life.desk, at, sub.now, price, sub.now.quantity)
    invoice = life.invoice_now(at, sub, "subscription_update", lines, succeeds=True)
    change_subscription(life.desk, sub, at, asked=True, price=price, latest_invoice=invoice.id)


def downgrade(life: Life, at: int, sub: Subscription) -> None:
    """To the plan below, without an invoice; from the lowest plan up first, and down some days later."""
    if sub.now.price.plan == PLANS[0]:
        upgrade(life, at, sub)
        life.after(at, 4, 12, lambda t: life.play(t, sub, downgrade))
        return
    price = PRICES[price_id(_plan_beside(sub, -1), sub.now.price.interval, life.customer.currency)]
    change_subscription(life.desk, sub, at, asked=True, price=price)


def buy_seats(life: Life, at: int, sub: Subscription, ending: str) -> None:
    """More seats, invoiced at once; the payment fails unless `ending` is "paid"."""
    quantity = sub.now.quantity + life.rng.randint(1, 6)
    lines = billing.proration_lines(life.desk, at, sub.now, sub.now.price, quantity)
    invoice = billing.draft_invoice(life.desk, sub, at, "subscription_update", lines, sub.now.period_start)
    if invoice.total <= 0:
        return
    billing.tell_invoice(life.desk, invoice, at, "invoice.created")
    finalize(life.desk, invoice, at)
    change_subscription(life.desk, sub, at, asked=True, quantity=quantity, latest_invoice=invoice.id)
    if ending == "paid":
        life.collect(invoice, at + 1, succeeds=True)
    else:
        life.fall_due(at + life.rng.randint(1, 3), sub, invoice, ending)


def change_quantity(life: Life, at: int, sub: Subscription) -> None:
    """More seats, and some days later fewer."""
    buy_seats(life, at, sub, "paid")
    life.after(at, 2, 10, lambda t: fewer_seats(life, t, sub))


def fewer_seats(life: Life, at: int, sub: Subscription) -> None:
    """One to three seats fewer."""
    if sub.now.status == "active":
        fewer = max(1, sub.now.quantity - life.rng.randint(1, 3))
        change_subscription(life.desk, sub, at, asked=True, quantity=fewer)


def change_interval(life: Life, at: int, sub: Subscription) -> None:
    """Monthly to yearly (a new period, invoiced at once) or back (a new period, the credit kept)."""
    interval = "year" if sub.now.price.interval == "month" else "month"
    price = PRICES[price_id(sub.now.price.plan, interval, life.customer.currency)]
    end = next_period(at, interval)
    latest = sub.now.latest_invoice
    if interval == "year":
        new = replace(sub.now, price=price, period_start=at, period_end=end)
        line = billing.period_line(life.desk, new, price.unit_minor * new.quantity)
        latest = life.invoice_now(at, sub, "subscription_update", [line], succeeds=True).id
    change_subscription(life.desk, sub, at, asked=True, price=price, period_start=at, period_end=end, latest_invoice=latest)
    life.appoint_renewal(sub)


def ask_to_cancel(life: Life, at: int, sub: Subscription) -> None:
    """Cancel at the end of the period."""
    change_subscription(
        life.desk,
        sub,
        at,
        asked=True,
        cancel_at_period_end=True,
        cancel_at=sub.now.period_end,
        canceled_at=at,
        cancellation_reason="cancellation_requested",
    )


def change_of_mind(life: Life, at: int, sub: Subscription) -> None:
    """Ask to cancel, then stay."""
    ask_to_cancel(life, at, sub)
    life.after(at, 0.1, 3, lambda t: stay(life, t, sub))


def stay(life: Life, at: int, sub: Subscription) -> None:
    """Take the wish to cancel back."""
    if sub.now.alive and sub.now.cancel_at_period_end:
        change_subscription(
            life.desk,
            sub,
            at,
            asked=True,
            cancel_at_period_end=False,
            cancel_at=None,
            canceled_at=None,
            cancellation_reason=None,
        )


def leave_and_return(life: Life, at: int, sub: Subscription) -> None:
    """Cancel now; a new subscription days later."""
    life.cancel(at, sub, "cancellation_requested")
    life.after(at, 1, 10, lambda t: life.subscribe(t, "direct"))


def leave_for_good(life: Life, at: int, sub: Subscription) -> None:
    """Cancel now; the customer is deleted days later."""
    life.cancel(at, sub, "cancellation_requested")
    life.after(at, 1, 4, lambda t: delete_customer(life, t))


def delete_customer(life: Life, at: int) -> None:
    """Delete the customer, when no subscription is alive."""
    if all(not sub.now.alive for sub in life.subscriptions):
        life.desk.log.add(at, "customer.deleted", render_customer(life.customer), asked=True)
        life.deleted_at = at


def overlap(life: Life, at: int, sub: Subscription) -> None:
    """A new subscription to another plan (mostly a higher one) begins some days before the old one is canceled."""
    beginning = "direct" if life.rng.random() < 0.6 else "trial"
    life.subscribe(at, beginning, _plan_beside(sub, 1 if life.rng.random() < 0.7 else -1))
    life.after(at, 1, 5, lambda t: life.cancel(t, sub, "cancellation_requested"))


def pause(life: Life, at: int, sub: Subscription) -> None:
    """Pause collection for some days (the status stays)."""
    behavior = life.rng.choice(("void", "mark_uncollectible", "keep_as_draft"))
    change_subscription(life.desk, sub, at, asked=True, pause_behavior=behavior)
    life.after(at, 2, 12, lambda t: unpause(life, t, sub))


def unpause(life: Life, at: int, sub: Subscription) -> None:
    """Collect again."""
    if sub.now.alive and sub.now.pause_behavior is not None:
        change_subscription(life.desk, sub, at, asked=True, pause_behavior=None)


# Several changes in one second. Each group is one chain: no state comes back except a cycle's first one, at its end,
# so `previous_attributes` and the state before the second decide the order.


def same_second_pair(life: Life, at: int, sub: Subscription) -> None:
    """A change of plan and of quantity."""
    change = upgrade if life.rng.random() < 0.5 else downgrade
    change(life, at, sub)
    change_subscription(life.desk, sub, at, asked=True, quantity=sub.now.quantity + 2)


def same_second_triple(life: Life, at: int, sub: Subscription) -> None:
    """Quantity twice and a wish to cancel."""
    quantity = sub.now.quantity
    change_subscription(life.desk, sub, at, asked=True, quantity=quantity + 5)
    change_subscription(life.desk, sub, at, asked=True, quantity=quantity + 3, purchase_order=base62(life.rng, 8))
    ask_to_cancel(life, at, sub)
    life.after(at, 0.5, 2, lambda t: stay(life, t, sub))


def same_second_cycle(life: Life, at: int, sub: Subscription) -> None:
    """Not paid and paid within one second: active, past_due, active."""
    lines = [billing.period_line(life.desk, sub.now, sub.now.price.unit_minor)]
    invoice = billing.draft_invoice(life.desk, sub, at, "subscription_update", lines, sub.now.period_start)
    billing.tell_invoice(life.desk, invoice, at, "invoice.created")
    finalize(life.desk, invoice, at)
    life.collect(invoice, at, succeeds=False)
    change_subscription(life.desk, sub, at, status="past_due")
    life.collect(invoice, at, succeeds=True)
    change_subscription(life.desk, sub, at, status="active")


failure_recovered = partial(buy_seats, ending="recovered")
failure_unpaid = partial(buy_seats, ending="unpaid")
failure_canceled = partial(buy_seats, ending="canceled")


def quiet(_life: Life, _at: int, _sub: Subscription) -> None:
    """Nothing."""


# The customers take these in turn, so a hundred of them show every one several times.
PLOTS: tuple[Plot, ...] = (
    upgrade,
    same_second_pair,
    failure_recovered,
    upgrade,
    ask_to_cancel,
    pause,
    change_quantity,
    same_second_cycle,
    failure_unpaid,
    upgrade,
    downgrade,
    leave_and_return,
    same_second_triple,
    overlap,
    failure_canceled,
    upgrade,
    change_interval,
    change_of_mind,
    same_second_cycle,
    leave_for_good,
    quiet,
)
# Plots that end the subscription come last in a life.
ENDINGS = (ask_to_cancel, leave_and_return, failure_canceled, leave_for_good, overlap)
