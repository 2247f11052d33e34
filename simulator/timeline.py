"""The rules of the truth: what state a subscription, a customer and a workspace is in at every second.

- Event time has one-second resolution. Of several changes in one second the last state holds; equal neighbours coalesce;
  intervals are [valid_from, valid_to), the last one open (None).
- `billing_status` is Stripe's status, except incomplete_expired -> canceled. A canceled subscription keeps its last plan
  and stays canceled for ever.
- A subscription's first state begins at `customer.subscription.created`'s `created`.
- Of a customer's simultaneous subscriptions the one in force is the best by: status class (active, trialing, past_due,
  unpaid, paused, incomplete, canceled: in this order), then higher plan rank, then later start, then greater id.
- A customer's timeline begins with its first subscription's creation and has no gap; before it there is no subscription.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from simulator.catalogue import PLAN_RANK
from simulator.state import Subscription, SubscriptionState

STATUS_CLASS = ("active", "trialing", "past_due", "unpaid", "paused", "incomplete", "canceled")


@dataclass(frozen=True, slots=True)
class StateInterval:
    """A subscription's tracked state over [valid_from, valid_to), epoch seconds."""

    subscription_id: str
    stripe_customer_id: str
    status: str
    billing_status: str
    price_id: str
    plan: str
    quantity: int
    cancel_at_period_end: bool
    pause_collection: bool
    valid_from: int
    valid_to: int | None


@dataclass(frozen=True, slots=True)
class PlanInterval:
    """The subscription in force for a customer over [valid_from, valid_to), epoch seconds."""

    stripe_customer_id: str
    subscription_id: str
    plan: str
    price_id: str
    billing_status: str
    valid_from: int
    valid_to: int | None


def billing_status(status: str) -> str:
    """Stripe's status, mapped."""
    return "canceled" if status == "incomplete_expired" else status


def _interval(sub: Subscription, state: SubscriptionState, start: int) -> StateInterval:
    return StateInterval(
        sub.id,
        sub.customer.id,
        state.status,
        billing_status(state.status),
        state.price.id,
        state.price.plan,
        state.quantity,
        state.cancel_at_period_end,
        state.pause_behavior is not None,
        start,
        None,
    )


def subscription_history(sub: Subscription) -> list[StateInterval]:
    """The states of one subscription as intervals, by the rules above."""
    last_of_second = dict(sub.states)  # a later state of the same second replaces the earlier one
    history: list[StateInterval] = []
    for at, state in last_of_second.items():
        new = _interval(sub, state, at)
        if history and replace(history[-1], valid_from=at) == new:
            continue
        if history:
            history[-1] = replace(history[-1], valid_to=at)
        history.append(new)
    return history


def _standing(interval: StateInterval, started: int) -> tuple[int, int, int, str]:
    """Greater is better."""
    rank = -STATUS_CLASS.index(interval.billing_status)
    return rank, PLAN_RANK[interval.plan], started, interval.subscription_id


def plan_timeline(histories: Iterable[Sequence[StateInterval]]) -> list[PlanInterval]:
    """One customer's subscriptions (a history each) to the one in force at every second."""
    histories = [h for h in histories if h]
    timeline: list[PlanInterval] = []
    for at in sorted({interval.valid_from for history in histories for interval in history}):
        live = []
        for history in histories:
            held = [i for i in history if i.valid_from <= at and (i.valid_to is None or at < i.valid_to)]
            live += [(_standing(i, history[0].valid_from), i) for i in held]
        best = max(live)[1]
        new = PlanInterval(best.stripe_customer_id, best.subscription_id, best.plan, best.price_id, best.billing_status, at, None)
        if timeline and replace(timeline[-1], valid_from=at) == new:
            continue
        if timeline:
            timeline[-1] = replace(timeline[-1], valid_to=at)
        timeline.append(new)
    return timeline
