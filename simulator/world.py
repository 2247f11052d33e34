"""The world: everything that happens to StreamForge over some days, made from a seed, all of it in memory."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import polars as pl

from simulator.billing import Desk, change_subscription, tell_subscription
from simulator.catalogue import PRICES, PRODUCTS, price_id
from simulator.chance import base62, generator
from simulator.events import Delivery, EventLog, Money, StripeEvent, disorder_ids, schedule
from simulator.identity import make_people, placed
from simulator.lives import BEGINNINGS, Life, next_period
from simulator.metering import UsageBill, bill_usage, metered_use
from simulator.payloads import ProductRecords
from simulator.people import make_card, make_person
from simulator.plots import ENDINGS, PLOTS
from simulator.shapes import render_customer, render_price, render_product
from simulator.state import Customer, CustomerState, Subscription, SubscriptionState
from simulator.timeline import PlanInterval, StateInterval, plan_timeline, subscription_history
from simulator.usage import make_usage
from simulator.workspaces import CrmChange, MembershipChange, Workspace, make_memberships, make_workspaces

HOUR, DAY = 3_600, 86_400
TAIL_DAYS = 4  # late deliveries are over by then


@dataclass(frozen=True)
class WorldConfig:
    """What makes a world. Equal configs make equal worlds, byte for byte.

    `product_events`: unique valid ones. `start`: midnight UTC. Below 100 customers or 20 days some plots do not occur.
    """

    seed: int = 7
    customers: int = 150
    days: int = 60
    product_events: int = 520_000
    start: datetime = datetime(2026, 1, 5, tzinfo=UTC)

    def __post_init__(self) -> None:
        if min(self.customers, self.days, self.product_events) < 1:
            raise ValueError("a world needs at least one customer, one day and one product event")
        if self.start.tzinfo is None or self.start.timestamp() % DAY:
            raise ValueError("WorldConfig.start must be midnight UTC, with its time zone")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the journal and the truth."""
        return {
            "seed": self.seed,
            "customers": self.customers,
            "days": self.days,
            "product_events": self.product_events,
            "start": self.start.astimezone(UTC).isoformat(),
        }


@dataclass(frozen=True)
class World:
    """A world: what is sent (deliveries, the changes of the CRM, `product_records`) and what is true (the rest).

    `start`, `end`: UTC; `end` includes the tail of late deliveries. `product_events`: the unique valid ones and where they count
    (see `identity.placed`); `stripe_events` are in true order.
    `histories`: by subscription id; `timelines`: by Stripe customer id; `money`: what was billed and what cash moved; `metered`:
    what was used of what is billed by use (see `metering.metered_use`), `usage_bills`: what of it was invoiced.
    """

    config: WorldConfig
    start: datetime
    end: datetime
    stripe_deliveries: list[Delivery]
    crm_changes: list[CrmChange]
    membership_changes: list[MembershipChange]
    product_records: ProductRecords
    product_events: pl.DataFrame
    stripe_events: list[StripeEvent]
    workspaces: list[Workspace]
    histories: dict[str, list[StateInterval]]
    timelines: dict[str, list[PlanInterval]]
    money: list[Money]
    metered: pl.DataFrame
    usage_bills: list[UsageBill]


def build_world(config: WorldConfig) -> World:
    """Make the world of a config: pure, deterministic, in memory (the default config: under 1 s, about 250 MB at the peak)."""
    start = int(config.start.timestamp())
    horizon = start + config.days * DAY
    end = config.start.astimezone(UTC) + timedelta(days=config.days + TAIL_DAYS)
    log = EventLog(generator(config.seed, "events"), horizon, start + config.days * DAY // 2)
    _tell_catalogue(log, start)
    lives = _lives(config, log, start)
    for life in lives:
        life.live()
    _tell_strangers(log, generator(config.seed, "strangers"), start)
    histories, timelines = _truth(lives)
    customers = [life.customer for life in lives]
    workspaces, changes = make_workspaces(generator(config.seed, "workspaces"), customers, horizon)
    people = make_people(generator(config.seed, "people"), workspaces, horizon)
    span = {"start": start, "days": config.days, "events": config.product_events}
    usage = make_usage(config.seed, workspaces, timelines, people, **span)
    records = ProductRecords(usage, [workspace.id for workspace in workspaces], config.seed)
    product_events = placed(usage.events, usage.records, people)
    metered = metered_use(records, product_events, workspaces, [customer.id for customer in customers])
    usage_bills = bill_usage(log, config.seed, (sub for life in lives for sub in life.subscriptions), timelines, metered)
    events = sorted(log.events, key=lambda event: (event.created, event.order))
    disorder_ids(events)
    deliveries = schedule(events, generator(config.seed, "deliveries"), start, horizon, int(end.timestamp()))
    memberships = make_memberships(generator(config.seed, "memberships"), workspaces, records.user_ids, people.stays)
    return World(
        config, config.start.astimezone(UTC), end, deliveries, changes, memberships, records, product_events, events, workspaces,
        histories, timelines, log.money, metered, usage_bills,
    )  # fmt: skip


def _truth(lives: list[Life]) -> tuple[dict[str, list[StateInterval]], dict[str, list[PlanInterval]]]:
    histories: dict[str, list[StateInterval]] = {}
    timelines: dict[str, list[PlanInterval]] = {}
    for life in lives:
        own = {sub.id: subscription_history(sub) for sub in life.subscriptions}
        histories |= own
        if own:
            timelines[life.customer.id] = plan_timeline(own.values())
    return histories, timelines


def _lives(config: WorldConfig, log: EventLog, start: int) -> list[Life]:
    """The customers: half come in the first days, the rest over three quarters of the world; plots go round, shuffled."""
    rng = generator(config.seed, "lives")
    span = config.days * DAY
    n = config.customers
    early = [start + HOUR + rng.randint(0, int(span * 0.05)) for _ in range(n // 2)]
    created = sorted(early + [start + HOUR + rng.randint(0, int(span * 0.75)) for _ in range(n - n // 2)])
    # Begin as the list goes round, with a second plot from a shuffled round, so that a hundred customers show all of it.
    second = rng.sample(PLOTS, len(PLOTS))
    lives = []
    for number, at in enumerate(created):
        own = generator(config.seed, f"customer/{number}")
        plots = [PLOTS[number % len(PLOTS)]]
        if own.random() < 0.5:
            plots.append(second[(number * 5) % len(second)])
        plots.sort(key=lambda plot: plot in ENDINGS)
        customer = _customer(own, at, livemode=True)
        beginning = BEGINNINGS[(number * 7) % len(BEGINNINGS)]
        lives.append(Life(Desk(log, own), customer, beginning, plots))
    return lives


def _customer(rng: Random, at: int, *, livemode: bool) -> Customer:
    person = make_person(rng)
    card = make_card(rng, person.country, datetime.fromtimestamp(at, UTC).year)
    currency = "eur" if person.country in ("DE", "FR", "ES") or rng.random() < 0.1 else "usd"
    prefix = f"{rng.getrandbits(32):08X}"
    state = CustomerState(person.email, person.company)
    return Customer(f"cus_{base62(rng, 14)}", person, card, at, currency, prefix, state, livemode=livemode)


def _tell_catalogue(log: EventLog, start: int) -> None:
    for number, product in enumerate(PRODUCTS):
        body = render_product(product, start)
        log.add(start + number, "product.created", body, asked=True)
    for number, price in enumerate(PRICES.values()):
        log.add(start + 10 + number, "price.created", render_price(price, log.version(start), created=start), asked=True)
    for number, product in enumerate(PRODUCTS[:3]):  # Stripe: setting the default price is an update
        body = render_product(product, start)
        body["default_price"] = price_id(product.plan, "month", "usd")
        log.add(start + 60 + number, "product.updated", body, {"default_price": None}, asked=True)


def _tell_strangers(log: EventLog, rng: Random, start: int) -> None:
    """Events that must disturb nothing: test mode, unknown types, objects without an id."""
    span = log.horizon - start
    for number in range(4):
        at = start + HOUR + int(span * (number + 0.3) / 5)
        desk = Desk(log, rng)
        customer = _customer(rng, at, livemode=False)
        log.add(at, "customer.created", render_customer(customer), asked=True)
        price = PRICES[price_id("pro", "month", customer.currency)]
        sub = Subscription(f"sub_1{base62(rng, 23)}", f"si_{base62(rng, 14)}", customer, at)
        sub.states.append((at, SubscriptionState("active", price, 1, at, next_period(at, "month"))))
        tell_subscription(desk, sub, at, "customer.subscription.created", asked=True)
        change_subscription(desk, sub, at + 30, asked=True, quantity=99)
        change_subscription(desk, sub, at + 90, asked=True, status="canceled", canceled_at=at + 90, ended_at=at + 90)
    charged = [event for event in log.events if event.type == "charge.succeeded"]
    for event in rng.sample(charged, min(6, len(charged))):
        warning = {
            "id": f"issfr_1{base62(rng, 23)}",
            "object": "radar.early_fraud_warning",
            "actionable": True,
            "charge": event.object_id,
            "created": event.created + 2 * HOUR,
            "fraud_type": "misc",
            "livemode": True,
            "payment_intent": event.data["object"]["payment_intent"],
        }
        log.add(event.created + 2 * HOUR, "radar.early_fraud_warning.created", warning)
    for number in range(5):
        at = start + int(span * (number + 0.6) / 6)
        reservation = {"id": f"bcr_{base62(rng, 24)}", "object": "billing.capacity_reservation", "livemode": True}
        log.add(at, "billing.capacity_reservation.renewed", reservation | {"units": {"minutes": number}})
        money = [{"amount": rng.randint(10_000, 900_000), "currency": "usd", "source_types": {"card": 0}}]
        balance = {"object": "balance", "available": money, "livemode": True, "pending": money}
        log.add(at + 5, "balance.available", balance)
