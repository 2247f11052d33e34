"""Stripe events and their deliveries: the envelope, the order within a second, repeats, lateness and bursts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from random import Random

import msgspec

from simulator.chance import base62, uuid4
from simulator.shapes import Json
from simulator.state import NEW_VERSION, OLD_VERSION

REPEATED, LATE = 0.04, 0.02
BURST_SECONDS = 1800  # what is due within so long is posted in one burst, at the time of its last delivery
_DAY = 86_400


@dataclass(slots=True)
class StripeEvent:
    """One event. `order` is its true place among all events of its customer; Stripe does not send that."""

    id: str
    created: int
    order: int
    type: str
    object_id: str | None
    object_type: str
    api_version: str
    livemode: bool
    data: Json
    request: Json

    def body(self, pending_webhooks: int) -> bytes:
        """The request body, as Stripe posts it."""
        return msgspec.json.encode(
            {
                "id": self.id,
                "object": "event",
                "api_version": self.api_version,
                "created": self.created,
                "data": self.data,
                "livemode": self.livemode,
                "pending_webhooks": pending_webhooks,
                "request": self.request,
                "type": self.type,
            }
        )


@dataclass(frozen=True, slots=True)
class Delivery:
    """One POST of one event. `deliver_at`: epoch seconds, simulated."""

    deliver_at: float
    body: bytes
    event_id: str


@dataclass(frozen=True, slots=True)
class Money:
    """One movement that finance must find: what happened, when, and when the revenue that it changes arose (epoch seconds).

    `origin_id`: the charge or invoice whose revenue it changes; `amount`: signed, minor units; `order`: events of its object tell
    it from this place on.
    """

    basis: str
    kind: str
    object_id: str
    origin_id: str
    customer_id: str
    currency: str
    amount: int
    at: int
    origin_at: int
    order: int


@dataclass(slots=True)
class EventLog:
    """Collects what happens before `horizon` (epoch seconds, exclusive), rendered at the version of its time."""

    rng: Random
    horizon: int
    switch_at: int
    events: list[StripeEvent] = field(default_factory=list)
    money: list[Money] = field(default_factory=list)

    def book(self, moved: Money) -> None:
        """Write down that money moved (or was billed); nothing happens at or after the horizon, and nothing moves nothing."""
        if moved.at < self.horizon and moved.amount:
            self.money.append(moved)

    def version(self, at: int) -> str:
        """The endpoint's API version at `at`: basil from the middle of the world on."""
        return OLD_VERSION if at < self.switch_at else NEW_VERSION

    def add(self, at: int, kind: str, obj: Json, previous: Json | None = None, *, asked: bool = False) -> None:
        """Record that `kind` happened to `obj` at `at`; nothing happens at or after the horizon.

        `previous`: `data.previous_attributes`. `asked`: by an API call (it has a request id), else by Stripe itself.
        """
        if at >= self.horizon:
            return
        request: Json = {"id": None, "idempotency_key": None}
        if asked:
            request = {"id": f"req_{base62(self.rng, 14)}", "idempotency_key": uuid4(self.rng)}
        event = StripeEvent(
            id=f"evt_{base62(self.rng, 24)}",
            created=at,
            order=len(self.events),
            type=kind,
            object_id=obj.get("id"),
            object_type=obj["object"],
            api_version=self.version(at),
            livemode=bool(obj.get("livemode", True)),
            data={"object": obj} if previous is None else {"object": obj, "previous_attributes": previous},
            request=request,
        )
        self.events.append(event)


def first_received(deliveries: Iterable[Delivery]) -> dict[str, float]:
    """When each event is received first (epoch seconds): when the burst that it comes in is posted."""
    received: dict[str, float] = {}
    for _, burst in groupby(deliveries, lambda delivery: int(delivery.deliver_at // BURST_SECONDS)):
        group = list(burst)
        for delivery in group:
            received.setdefault(delivery.event_id, group[-1].deliver_at)
    return received


def disorder_ids(events: Iterable[StripeEvent]) -> None:
    """Make the ids of one subscription's events in one second descend, so that sorting by id reverses the truth."""
    groups: dict[tuple[str | None, int], list[StripeEvent]] = defaultdict(list)
    for event in events:
        if event.object_type == "subscription":
            groups[event.object_id, event.created].append(event)
    for group in groups.values():
        for event, event_id in zip(group, sorted((e.id for e in group), reverse=True), strict=True):
            event.id = event_id


def _bursts(rng: Random, start: int, horizon: int) -> list[tuple[int, int]]:
    """A few hours in which Stripe held deliveries back: [from, to), all of it arrives just after `to`."""
    span = horizon - start
    at = [start + int(span * share) for share in (0.2, 0.45, 0.7, 0.9)]
    return [(begin, begin + rng.randint(1800, 5400)) for begin in at]


def schedule(events: Iterable[StripeEvent], rng: Random, start: int, horizon: int, end: int) -> list[Delivery]:
    """Every event at least once, all before `end`, sorted by time of delivery.

    Most arrive 0.5 to 30 s after `created` in no order; 2 % are 1 to 3 days late; 4 % come again one to three times within
    days, half of them with another `pending_webhooks`; what falls into a burst is held and then comes within 90 s.
    """
    bursts = _bursts(rng, start, horizon)
    deliveries = []
    for event in events:
        pending = rng.randint(1, 3)
        body = event.body(pending)
        at = event.created + min(0.5 + rng.expovariate(0.25), 30.0)
        if rng.random() < LATE:
            at = event.created + rng.uniform(1.0, 3.0) * _DAY
        else:
            held = next((to for begin, to in bursts if begin <= event.created < to), None)
            if held is not None:
                at = held + rng.uniform(0.0, 90.0)
        at = min(at, end - rng.uniform(60.0, 3600.0))
        deliveries.append(Delivery(round(at, 3), body, event.id))
        if rng.random() < REPEATED:
            for _ in range(rng.choice((1, 1, 2, 3))):
                at = min(at + rng.choice((rng.uniform(5, 600), rng.uniform(3_600, _DAY))), end - rng.uniform(1.0, 60.0))
                again = body if rng.random() < 0.5 else event.body(max(pending - 1, 0))
                deliveries.append(Delivery(round(at, 3), again, event.id))
    deliveries.sort(key=lambda d: (d.deliver_at, d.event_id))
    return deliveries
