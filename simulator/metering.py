"""What is billed by use: metered by the day, invoiced by the month, and partly wrong, as such bills are.

On the second day of a month every customer with a subscription in good standing gets an invoice of its own for the month before:
a line a metric (an invoice item; whole units at the metric's price), payable within 30 days. What is not invoiced has leaked:

- a subscription that has ended by then, or is unpaid, is not invoiced any more;
- `lost`: the meter's reports of some days of a month never reached Stripe;
- `one metric`: the storage of the customer was never set up to be billed.

And of some customers (`twice`) the reports of a month were sent twice: they are billed for more than they used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import polars as pl

from simulator.attribution import owners
from simulator.billing import Desk, attempt, draft_invoice, finalize, tell_invoice
from simulator.catalogue import METRICS, PRICES, Metric, metered_price_id
from simulator.chance import generator
from simulator.events import EventLog
from simulator.payloads import ProductRecords
from simulator.state import Line, Subscription
from simulator.timeline import PlanInterval
from simulator.usage import EVENT_NAMES
from simulator.workspaces import Workspace

HOUR, DAY = 3_600, 86_400
TERMS = 30 * DAY
_FAULTS = ("", "lost", "one metric", "twice"), (80, 10, 5, 5)
_NEVER_PAYS = 0.10
_BILLED = ("active", "trialing", "past_due")


@dataclass(frozen=True, slots=True)
class UsageBill:
    """One metered line of an invoice: whole units of `metric` used in a calendar month (UTC), in minor units of `currency`."""

    customer_id: str
    metric: str
    month: date
    currency: str
    quantity: int
    amount: int


def metered_use(
    records: ProductRecords, events: pl.DataFrame, workspaces: Sequence[Workspace], customers: Sequence[str]
) -> pl.DataFrame:
    """What each customer used of each metric on each day (UTC): customer_id, metric, day, events, amount (ms, bytes).

    events: of `identity.placed`. By the owner of the workspace at the time; what cannot be told is metered for nobody.
    """
    owner = owners(events, workspaces, customers)["owner"]
    use = pl.DataFrame(
        {
            "customer_id": pl.Series(customers, dtype=pl.String).gather(owner),
            "name": events["name"],
            "day": (events["occurred_at"] * 1000).cast(pl.Datetime("us")).dt.date(),
        }
    ).hstack(records.measures(events))
    parts = [
        use.filter(pl.col("customer_id").is_not_null(), pl.col("name") == EVENT_NAMES.index(metric.event_name))
        .group_by("customer_id", pl.lit(metric.name).alias("metric"), "day")
        .agg(events=pl.len().cast(pl.Int64), amount=pl.col(metric.measure).sum())
        for metric in METRICS
    ]
    return pl.concat(parts).sort("customer_id", "metric", "day")


def by_month(use: pl.DataFrame) -> pl.DataFrame:
    """Use by calendar month, in whole units: customer_id, metric, month, events, quantity."""
    per_unit = pl.col("metric").replace_strict({m.name: m.per_unit for m in METRICS}, return_dtype=pl.Int64)
    months = use.group_by("customer_id", "metric", pl.col("day").dt.truncate("1mo").alias("month"))
    summed = months.agg(pl.col("events").sum(), pl.col("amount").sum())
    return summed.select("customer_id", "metric", "month", "events", quantity=pl.col("amount") // per_unit).sort(
        "customer_id", "month", "metric"
    )


def bill_usage(
    log: EventLog,
    seed: int,
    subscriptions: Iterable[Subscription],
    timelines: Mapping[str, Sequence[PlanInterval]],
    use: pl.DataFrame,
) -> list[UsageBill]:
    """Invoice each whole month of `use` (see `metered_use`), as far as it was reported and before the log's horizon."""
    by_id = {sub.id: sub for sub in subscriptions}
    amounts: dict[str, dict[date, dict[str, dict[date, int]]]] = {}
    for customer, metric, day, amount in use.select("customer_id", "metric", "day", "amount").iter_rows():
        of_month = amounts.setdefault(customer, {}).setdefault(day.replace(day=1), {})
        of_month.setdefault(metric, {})[day] = amount
    billed: list[UsageBill] = []
    for customer, months in sorted(amounts.items()):
        desk = Desk(log, generator(seed, f"metering/{customer}"))
        fault = desk.rng.choices(*_FAULTS)[0]
        doubled = desk.rng.choice(sorted(months))
        for month, reports in sorted(months.items()):
            end = (month + timedelta(days=31)).replace(day=1)
            at = _seconds(end) + DAY + desk.rng.randint(0, 6 * HOUR)
            first = desk.rng.randint(1, 24)
            lost = range(first, first + desk.rng.randint(3, 7)) if fault == "lost" else range(0)
            plan = next((i for i in timelines.get(customer, ()) if i.valid_from <= at < (i.valid_to or at + 1)), None)
            if at >= log.horizon or plan is None or plan.billing_status not in _BILLED:
                continue
            times = 2 if fault == "twice" and month == doubled else 1
            quantities = {
                metric: times
                * (sum(reports.get(metric.name, {}).get(day, 0) for day in _days(month, end, lost)) // metric.per_unit)
                for metric in (METRICS[:1] if fault == "one metric" else METRICS)
            }
            billed += _invoice(desk, by_id[plan.subscription_id], at, month, end, quantities)
    return billed


def _days(month: date, end: date, lost: range) -> list[date]:
    """The days of [month, end) but those whose day of the month is in `lost`."""
    days = (month + timedelta(days=n) for n in range((end - month).days))
    return [day for day in days if day.day not in lost]


def _invoice(desk: Desk, sub: Subscription, at: int, month: date, end: date, quantities: Mapping[Metric, int]) -> list[UsageBill]:
    """One customer's use of one month: finalized at `at`, sent, and mostly paid before it is due."""
    customer = sub.customer
    lines, billed = [], []
    for metric, quantity in quantities.items():
        if not quantity:
            continue
        price = PRICES[metered_price_id(metric, customer.currency)]
        item, text = desk.new_id("ii"), f"{quantity} {metric.name.replace('_', ' ')}"
        span = _seconds(month), _seconds(end)
        lines.append(
            Line(desk.new_id("il"), quantity * price.unit_minor, text, price, quantity, *span, proration=False, item=item)
        )
        billed.append(UsageBill(customer.id, metric.name, month, customer.currency, quantity, lines[-1].amount))
    if lines:
        invoice = draft_invoice(desk, sub, at, "manual", lines, _seconds(month))
        invoice.due = at + TERMS
        tell_invoice(desk, invoice, at, "invoice.created")
        finalize(desk, invoice, at)
        paid_at = at + desk.rng.randint(15 * DAY, TERMS)
        if desk.rng.random() >= _NEVER_PAYS and paid_at < desk.log.horizon:
            attempt(desk, invoice, paid_at, succeeds=True)
    return billed


def _seconds(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())
