"""What finance must find: the money that moved, and how the monthly recurring revenue changed, from the world's own state.

MRR of a customer and currency at the end of a day: the sum over its subscriptions that are active or past_due then of unit
price times seats, a year's by twelfths rounded half up. A day on which it differs from the day before is a movement.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from math import inf

import polars as pl

from simulator.catalogue import PRICES
from simulator.events import Money, first_received
from simulator.timeline import StateInterval
from simulator.world import World

_DAY = 86_400
_CLOSED_AFTER = 86_400  # seconds after its end
_MOMENT = pl.Datetime("us", "UTC")
MONEY = ["basis", "entry_type", "object_id", "origin_id", "customer_id", "currency", "amount_minor", "booked_at", "effective_at"]
MOVEMENTS = {
    "customer_id": pl.String,
    "currency": pl.String,
    "movement_date": pl.Date,
    "movement": pl.String,
    "before_minor": pl.Int64,
    "after_minor": pl.Int64,
}


def revenue(money: Iterable[Money]) -> pl.DataFrame:
    """One row a movement of money, columns MONEY; times UTC."""
    rows = [(m.basis, m.kind, m.object_id, m.origin_id, m.customer_id, m.currency, m.amount, m.at, m.origin_at) for m in money]
    frame = pl.DataFrame(rows, schema=MONEY, orient="row")
    return frame.with_columns((pl.col("booked_at", "effective_at").cast(pl.Int64) * 1_000_000).cast(_MOMENT))


def posting_dates(world: World, withheld: Iterable[str] = ()) -> list[date | None]:
    """The day on which each of `world.money` is booked; None for what only `withheld` events tell.

    That is the day it happened, if that day was still open when it was first known, else the first day that was: a day is closed
    24 hours after its end. It is known by the first event received of its object that was told when it had happened, or after; a
    refund also by its charge, and so is its failure while the refund itself is not known.
    """
    withheld = set(withheld)
    received = first_received(d for d in world.stripe_deliveries if d.event_id not in withheld)
    told: dict[str | None, list[tuple[int, float]]] = defaultdict(list)
    for event in world.stripe_events:
        if event.id in received:
            told[event.object_id].append((event.order, received[event.id]))

    def first_of(object_id: str, order: int) -> float:
        return min((at for place, at in told[object_id] if place >= order), default=inf)

    found: list[date | None] = []
    for moved in world.money:
        known = first_of(moved.object_id, moved.order)
        by_charge = first_of(moved.origin_id, moved.order)
        if moved.kind == "refund" or (moved.kind == "refund_failed" and by_charge < first_of(moved.object_id, 0)):
            known = min(known, by_charge)
        found.append(max(_day(moved.at), _day(known - _CLOSED_AFTER)) if known < inf else None)
    return found


def _day(seconds: float) -> date:
    return datetime.fromtimestamp(seconds, UTC).date()


def mrr_movements(histories: Iterable[Sequence[StateInterval]]) -> pl.DataFrame:
    """One row a customer, currency and day on which its MRR changed, by looking at every such day."""
    of_customer: dict[tuple[str, str], list[StateInterval]] = {}
    for history in histories:
        for interval in history:
            key = interval.stripe_customer_id, PRICES[interval.price_id].currency
            of_customer.setdefault(key, []).append(interval)
    rows = [(*key, *movement) for key, intervals in of_customer.items() for movement in _movements(intervals)]
    return pl.DataFrame(rows, schema=MOVEMENTS, orient="row").sort("customer_id", "currency", "movement_date")


def _movements(intervals: Sequence[StateInterval]) -> list[tuple[date, str, int, int]]:
    edges = {i.valid_from for i in intervals} | {i.valid_to for i in intervals if i.valid_to is not None}
    found: list[tuple[date, str, int, int]] = []
    for day in sorted({datetime.fromtimestamp(at, UTC).date() for at in edges}):
        before, after = mrr(intervals, day - timedelta(days=1)), mrr(intervals, day)
        if before == after:
            continue
        if before == 0:
            kind = "reactivation" if any(f[3] for f in found) else "new"
        elif after == 0:
            kind = "churn"
        else:
            kind = "expansion" if after > before else "contraction"
        found.append((day, kind, before, after))
    return found


def mrr(intervals: Sequence[StateInterval], day: date) -> int:
    """Monthly recurring revenue at the end of a day (UTC)."""
    end = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) + _DAY
    total = 0
    for interval in intervals:
        held = interval.valid_from < end and (interval.valid_to is None or interval.valid_to >= end)
        if held and interval.status in ("active", "past_due"):
            price = PRICES[interval.price_id]
            months = 12 if price.interval == "year" else 1
            total += (price.unit_minor * interval.quantity * 2 + months) // (2 * months)
    return total
