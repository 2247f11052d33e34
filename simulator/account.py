"""The account behind the simulated Stripe API: what it holds at a moment of simulated time, from the world's own events.

Objects are rendered at the API version that is asked for, as Stripe does it: an object that was last written under
`2024-06-20` has another shape when it is fetched under `2025-03-31.basil` than in the webhook that told of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from simulator.events import StripeEvent
from simulator.shapes import Json
from simulator.state import OLD_VERSION

KEPT_DAYS = 30  # https://docs.stripe.com/api/events: "events going back up to 30 days"
_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Found:
    """One object or event as the API gives it. `place` orders a list: newest first."""

    id: str
    place: tuple[int, int]
    body: Json


@dataclass(frozen=True, slots=True)
class Version:
    """A state of an object: from `created` on; `body` None once it is deleted."""

    created: int
    order: int
    body: Json | None
    api_version: str


class Account:
    """What one Stripe account holds, by its events; those of test mode are seen with a test key only."""

    def __init__(self, events: Iterable[StripeEvent]) -> None:
        self._events: dict[bool, list[StripeEvent]] = {True: [], False: []}
        self._states: dict[tuple[bool, str], dict[str, list[Version]]] = {}
        for event in sorted(events, key=lambda e: (e.created, e.order)):
            self._events[event.livemode].append(event)
            body = event.data["object"]
            if event.object_id is not None:
                gone = event.type.endswith(".deleted") and event.object_type != "subscription"  # a canceled one stays
                self._keep(event, event.object_type, event.object_id, None if gone else body)
            for inner in body.get("balance_transactions") or ():  # of a dispute: objects of their own, told by no event
                self._keep(event, "balance_transaction", inner["id"], inner)

    def _keep(self, event: StripeEvent, object_type: str, object_id: str, body: Json | None) -> None:
        of_type = self._states.setdefault((event.livemode, object_type), {})
        of_type.setdefault(object_id, []).append(Version(event.created, event.order, body, event.api_version))

    def events(self, now: float, livemode: bool, kinds: Iterable[str] = ()) -> Iterator[Found]:
        """The events of the last 30 days up to `now`, newest first; `kinds` may end in `.*`."""
        found = self._events[livemode]
        patterns = list(kinds)
        end = bisect_right(found, now, key=lambda e: e.created)
        for number in range(end - 1, -1, -1):
            event = found[number]
            if event.created < now - KEPT_DAYS * _DAY:
                return
            if not patterns or any(fnmatchcase(event.type, p) for p in patterns):
                yield Found(event.id, (event.created, event.order), _rendered(event))

    def objects(self, object_type: str, now: float, livemode: bool, version: str | None) -> list[Found]:
        """The objects of one type that exist at `now`, newest first; deleted ones are not listed."""
        found = []
        for object_id, versions in self._states.get((livemode, object_type), {}).items():
            last = _last(versions, now)
            if last is None or last.body is None:
                continue
            body = at_version(last.body, version or last.api_version)
            # a place by the first version: objects of one second keep the order in which they came to be
            found.append(Found(object_id, (int(body.get("created") or 0), versions[0].order), body))
        return sorted(found, key=lambda f: f.place, reverse=True)

    def retrieve(self, object_type: str, object_id: str, now: float, livemode: bool, version: str | None) -> Json | None:
        """One object at `now`; a deleted one as Stripe leaves it: its id and `deleted`. None if it never was."""
        last = _last(self._states.get((livemode, object_type), {}).get(object_id, []), now)
        if last is None:
            return None
        if last.body is None:
            return {"id": object_id, "object": object_type, "deleted": True}
        return at_version(last.body, version or last.api_version)

    def event(self, event_id: str, now: float, livemode: bool) -> Json | None:
        """One event of the last 30 days; None if there is none."""
        return next((found.body for found in self.events(now, livemode) if found.id == event_id), None)


def _last(versions: list[Version], now: float) -> Version | None:
    at = bisect_right(versions, now, key=lambda v: v.created)
    return versions[at - 1] if at else None


def _rendered(event: StripeEvent) -> Json:
    """The event object: `data` as it was rendered then, whatever version is asked for; all webhooks are through."""
    return {
        "id": event.id,
        "object": "event",
        "api_version": event.api_version,
        "created": event.created,
        "data": event.data,
        "livemode": event.livemode,
        "pending_webhooks": 0,
        "request": event.request,
        "type": event.type,
    }


def at_version(body: Json, version: str) -> Json:
    """An object at an API version: one written before basil is brought to basil's shape if a later version is asked for."""
    if version == OLD_VERSION:
        return body
    upgrade = {"subscription": _subscription, "invoice": _invoice, "charge": _without_invoice, "payment_intent": _without_invoice}
    return upgrade.get(body["object"], lambda b: b)(body)


def _without(body: Json, *names: str) -> Json:
    return {name: value for name, value in body.items() if name not in names}


def _subscription(body: Json) -> Json:
    if "current_period_start" not in body:
        return body
    period = {name: body[name] for name in ("current_period_end", "current_period_start")}
    items = body["items"]
    moved = items | {"data": [item | period for item in items["data"]]}
    return _without(body, *period, "plan", "quantity", "discount") | {"items": moved}


def _invoice(body: Json) -> Json:
    if "subscription" not in body:
        return body
    details: Json = {"metadata": {}, "subscription": body["subscription"]}
    parent: Json = {"quote_details": None, "subscription_details": details, "type": "subscription_details"}
    lines: Json = body["lines"] | {"data": [_line(line) for line in body["lines"]["data"]]}
    gone = ("subscription", "subscription_details", "charge", "payment_intent", "paid", "paid_out_of_band", "discount", "quote")
    return _without(body, *gone, "tax", "total_tax_amounts", "transfer_data") | {"parent": parent, "lines": lines}


def _line(line: Json) -> Json:
    if "subscription" not in line:
        return line
    details: Json = {
        "invoice_item": None,
        "proration": line["proration"],
        "proration_details": line["proration_details"],
        "subscription": line["subscription"],
        "subscription_item": line["subscription_item"],
    }
    price: dict[str, Any] = line["price"]
    gone = (
        "amount_excluding_tax",
        "plan",
        "price",
        "proration",
        "proration_details",
        "subscription",
        "subscription_item",
        "type",
    )
    return _without(line, *gone, "tax_amounts", "tax_rates", "unit_amount_excluding_tax") | {
        "parent": {"invoice_item_details": None, "subscription_item_details": details, "type": "subscription_item_details"},
        "pretax_credit_amounts": [],
        "pricing": {
            "price_details": {"price": price["id"], "product": price["product"]},
            "type": "price_details",
            "unit_amount_decimal": price["unit_amount_decimal"],
        },
        "taxes": [],
    }


def _without_invoice(body: Json) -> Json:
    return _without(body, "invoice")
