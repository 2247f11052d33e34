"""What the marts must say, from the world's own state: each figure by the words of docs/metrics.md, and not by the SQL.

A frame a mart, with the mart's columns but for `account` and `complete`; days and months are UTC, money is minor units. What the
lake learns late (a workspace entered days after, a plan told out of order) stands here as it is in the end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any

import polars as pl

from simulator.attribution import attributed
from simulator.catalogue import FEATURES, FREE_FEATURES, METRICS, PLAN_FEATURES, PLAN_RANK, PRICES, metered_price_id
from simulator.identity import EVERYTHING
from simulator.metering import by_month
from simulator.revenue import mrr, mrr_movements, posting_dates, revenue
from simulator.timeline import PlanInterval, StateInterval
from simulator.usage import EVENT_NAMES
from simulator.world import World

ANY = "(any)"
WINDOW_MS = 7 * 86_400_000
DELINQUENT, EXPOSED, UPGRADED = ("past_due", "unpaid", "canceled"), ("active", "trialing"), ("active", "trialing", "past_due")
INTENSITIES = ((0, "none"), (7, "light"), (19, "regular"), (31, "heavy"))
KEYS = {
    "workspace_engagement_daily": ["workspace_id", "activity_date"],
    "revenue_daily": ["currency", "revenue_date"],
    "mrr_movements": ["currency", "month", "plan"],
    "arpa_by_cohort": ["currency", "month", "cohort_month", "usage_intensity"],
    "delinquent_feature_usage": ["customer_id", "usage_date", "feature", "billing_status"],
    "upgrade_exposures": ["plan", "feature", "exposure_date"],
    "usage_vs_billed": ["customer_id", "metric", "month"],
}
"""The key of each mart, less the account: this company has one."""

_MEASURES = {
    "charge": "gross",
    "refund": "refunds",
    "refund_failed": "refunds",
    "dispute_withdrawn": "disputes",
    "dispute_reinstated": "disputes",
    "dispute_fee": "fees",
}
_TYPES: dict[str, pl.DataType] = (
    dict.fromkeys(("currency", "plan", "feature", "feature_plan", "customer_id", "billing_status"), pl.String())
    | dict.fromkeys(("metric", "usage_intensity", "unit_amount_decimal"), pl.String())
    | dict.fromkeys(
        ("revenue_date", "month", "cohort_month", "usage_date", "exposure_date", "first_date", "last_date"), pl.Date()
    )
    | dict.fromkeys(("upgrade_rate", "baseline_rate", "lift", "odds_ratio"), pl.Float64())
    | {"supported": pl.Boolean()}
)
"""Of the columns that are no whole numbers."""
_MRR_KINDS = ("new", "expansion", "contraction", "churn", "reactivation")


def marts(world: World, withheld: Iterable[str] = ()) -> dict[str, pl.DataFrame]:
    """Each mart's rows, by the mart's name; the funnel's are made of `upgrade_exposures` (see `funnel`).

    withheld: ids of Stripe events that are never delivered. What only they tell has no posting date, hence no booked revenue.
    """
    events = _events(world)
    engagement = workspace_engagement_daily(events)
    by_customer = _intervals(world.histories.values())
    return {
        "workspace_engagement_daily": engagement,
        "revenue_daily": revenue_daily(revenue(world.money), posting_dates(world, withheld), engagement),
        "mrr_movements": monthly_movements(world, by_customer),
        "arpa_by_cohort": arpa_by_cohort(world, by_customer, engagement),
        "delinquent_feature_usage": delinquent_feature_usage(events, world.histories),
        "upgrade_exposures": upgrade_exposures(events, world.timelines),
        "usage_vs_billed": usage_vs_billed(world, events),
    }


def _events(world: World) -> pl.DataFrame:
    """The unique valid events with whose they are, and day, user, session, feature and name in words."""
    events = attributed(world.product_events, world.workspaces, world.timelines)
    return events.with_columns(
        day=(pl.col("occurred_at") * 1000).cast(pl.Datetime("us")).dt.date(),
        session=pl.struct("device", pl.col("occurred_at") // 1_800_000),  # a session is half an hour at one device
        feature=pl.Series(FEATURES).gather(events["feature"]),
        sent=pl.col("told") == EVERYTHING,
        event_name=pl.Series(EVENT_NAMES).gather(events["name"]),
        workspace_id=pl.Series([w.id for w in world.workspaces]).gather(events["workspace"]),
    ).sort("occurred_at")


def _month(day: date) -> date:
    return day.replace(day=1)


def _month_end(month: date) -> date:
    return _month(month + timedelta(days=31)) - timedelta(days=1)


def _half_up(amount: int, parts: int) -> int:
    return (2 * amount + parts) // (2 * parts)


def _frame(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={c: _TYPES.get(c, pl.Int64()) for c in columns}, orient="row")


# Engagement and revenue


def workspace_engagement_daily(events: pl.DataFrame) -> pl.DataFrame:
    """What each workspace did on each day, by the events that name it; whose it was at the last of them that has a customer."""
    key = KEYS["workspace_engagement_daily"]
    events = events.filter("sent").rename({"day": "activity_date"})
    counted = events.group_by(key).agg(
        events=pl.len().cast(pl.Int64),
        active_users=pl.col("user").n_unique().cast(pl.Int64),
        sessions=pl.col("session").n_unique().cast(pl.Int64),
        features_used=pl.col("feature").drop_nulls().n_unique().cast(pl.Int64),
    )
    owners = (
        events.filter(pl.col("customer_id").is_not_null())
        .group_by(key)
        .agg(pl.col("customer_id", "plan", "price_id", "billing_status").last())
    )
    return counted.join(owners, on=key, how="left")


def revenue_daily(money: pl.DataFrame, posted: Sequence[date | None], engagement: pl.DataFrame) -> pl.DataFrame:
    """Booked on the posting day, restated on the day of the sale, and beside it who used the product that day."""
    cells: dict[tuple[str, date], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for entry, posting_date in zip(money.to_dicts(), posted, strict=True):
        for reading, day in (("booked", posting_date), ("restated", entry["effective_at"].date())):
            if day is None:
                continue
            cell = cells[entry["currency"], day]
            if entry["basis"] == "billed":
                cell[f"{reading}_billed_minor"] += entry["amount_minor"]
            else:
                cell[f"{reading}_{_MEASURES[entry['entry_type']]}_minor"] += entry["amount_minor"]
                cell[f"{reading}_net_minor"] += entry["amount_minor"]
    customers = defaultdict(set)
    for row in engagement.filter(pl.col("price_id").is_not_null()).to_dicts():
        key = PRICES[row["price_id"]].currency, row["activity_date"]
        customers[key].add(row["customer_id"])
        cells[key]["active_workspaces"] += 1
        cells[key]["events"] += row["events"]
    columns = [
        f"{r}_{m}_minor" for r in ("booked", "restated") for m in ("gross", "refunds", "disputes", "fees", "net", "billed")
    ]
    return _frame(
        [*KEYS["revenue_daily"], *columns, "active_customers", "active_workspaces", "events"],
        [
            [*key, *(cell[column] for column in columns), len(customers[key]), cell["active_workspaces"], cell["events"]]
            for key, cell in cells.items()
        ],
    )


# Monthly recurring revenue

ByCustomer = Mapping[tuple[str, str], Sequence[StateInterval]]


def _intervals(histories: Iterable[Sequence[StateInterval]]) -> ByCustomer:
    """The intervals of each (customer, currency)."""
    found: dict[tuple[str, str], list[StateInterval]] = defaultdict(list)
    for history in histories:
        for interval in history:
            found[interval.stripe_customer_id, PRICES[interval.price_id].currency].append(interval)
    return found


def monthly_movements(world: World, by_customer: ByCustomer) -> pl.DataFrame:
    """The movements of MRR by month and plan."""
    cells: dict[tuple[str, date, str], dict[str, Any]] = defaultdict(lambda: defaultdict(int))
    customers = defaultdict(set)
    for row in mrr_movements(world.histories.values()).to_dicts():
        customer, currency, day = row["customer_id"], row["currency"], row["movement_date"]
        key = currency, _month(day), plan_of_movement(by_customer[customer, currency], day)
        change = row["after_minor"] - row["before_minor"]
        cells[key][f"{row['movement']}_minor"] += change
        cells[key]["change_minor"] += change
        cells[key]["movements"] += 1
        customers[key].add(customer)
    columns = [*(f"{kind}_minor" for kind in _MRR_KINDS), "change_minor", "movements"]
    rows = [[*key, *(cell[column] for column in columns), len(customers[key])] for key, cell in cells.items()]
    return _frame([*KEYS["mrr_movements"], *columns, "customers"], rows)


def plan_of_movement(intervals: Sequence[StateInterval], day: date) -> str:
    """The customer's highest plan that counts at the end of the day; if none does, the highest of those that ended that day."""
    counting = [i for i in intervals if i.status in ("active", "past_due")]
    at_end = [i.plan for i in counting if mrr([i], day)]
    ended = [i.plan for i in counting if i.valid_to is not None and _date(i.valid_to) == day]
    return max(at_end or ended, key=PLAN_RANK.__getitem__)


def _date(seconds: int) -> date:
    return datetime.fromtimestamp(seconds, UTC).date()


def arpa_by_cohort(world: World, by_customer: ByCustomer, engagement: pl.DataFrame) -> pl.DataFrame:
    """MRR at the end of each month, by the month of the customer's first MRR and by its active days."""
    active: dict[tuple[str, date], set[date]] = defaultdict(set)
    for customer, day in (
        engagement.filter(pl.col("customer_id").is_not_null()).select("customer_id", "activity_date").iter_rows()
    ):
        active[customer, _month(day)].add(day)
    first: dict[tuple[str, str], date] = {}
    months = {month for _, month in active}
    for row in mrr_movements(world.histories.values()).to_dicts():  # sorted by day
        first.setdefault((row["customer_id"], row["currency"]), row["movement_date"])
        months.add(_month(row["movement_date"]))
    cells: dict[tuple[str, date, date, str], list[tuple[int, int]]] = defaultdict(list)
    for (customer, currency), began in first.items():
        for month in months:
            amount = mrr(by_customer[customer, currency], _month_end(month))
            if amount and _month(began) <= month:
                days = len(active[customer, month])
                intensity = next(name for most, name in INTENSITIES if days <= most)
                cells[currency, month, _month(began), intensity].append((days, amount))
    rows = []
    for key, found in cells.items():
        total = sum(amount for _, amount in found)
        rows.append([*key, len(found), sum(days for days, _ in found), total, _half_up(total, len(found))])
    return _frame([*KEYS["arpa_by_cohort"], "customers", "active_days", "mrr_minor", "arpa_minor"], rows)


# Features


def delinquent_feature_usage(events: pl.DataFrame, histories: Mapping[str, Sequence[StateInterval]]) -> pl.DataFrame:
    """Uses of paid features by those who do not pay, and their share of a day of the list price."""
    needs = {feature: plan for plan, features in PLAN_FEATURES.items() for feature in features if feature not in FREE_FEATURES}
    used = events.filter(
        pl.col("billing_status").is_in(DELINQUENT),
        pl.col("feature").is_in(list(needs)),
        pl.col("event_name") != "feature_attempted",
    )
    first: dict[tuple[str, date], dict[str, Any]] = {}
    count: dict[tuple[str, date], dict[tuple[str, str], int]] = defaultdict(lambda: defaultdict(int))
    columns = ("customer_id", "day", "feature", "billing_status", "plan", "subscription_id", "occurred_at")
    for row in used.select(columns).iter_rows(named=True):  # sorted by time
        key = row["customer_id"], row["day"]
        first.setdefault(key, row)
        count[key][row["feature"], row["billing_status"]] += 1
    rows = []
    for (customer, day), features in count.items():
        began = first[customer, day]
        at = began["occurred_at"] // 1000
        state = next(
            i for i in histories[began["subscription_id"]] if i.valid_from <= at and (i.valid_to is None or at < i.valid_to)
        )
        price = PRICES[state.price_id]
        yearly = price.unit_minor * state.quantity * (12 if price.interval == "month" else 1)
        worth, whole, reached = _half_up(yearly, 365), sum(features.values()), 0
        for (feature, status), number in sorted(features.items()):
            share = worth * (reached + number) // whole - worth * reached // whole
            reached += number
            rows.append([customer, day, feature, status, began["plan"], needs[feature], number, price.currency, share])
    values = ["plan", "feature_plan", "events", "currency", "leakage_minor"]
    return _frame([*KEYS["delinquent_feature_usage"], *values], rows)


def upgrade_moments(timeline: Sequence[PlanInterval]) -> list[int]:
    """When (epoch ms) a higher plan than the last one in use began; what was never paid is not in use."""
    in_use = [i for i in timeline if i.billing_status in UPGRADED]
    return [after.valid_from * 1000 for before, after in pairwise(in_use) if PLAN_RANK[after.plan] > PLAN_RANK[before.plan]]


def upgrade_exposures(events: pl.DataFrame, timelines: Mapping[str, Sequence[PlanInterval]]) -> pl.DataFrame:
    """Customers on a plan who used a feature (or any) on a day, and those of them who moved up within the window."""
    good = events.filter(pl.col("billing_status").is_in(EXPOSED), pl.col("feature").is_not_null())
    upgrades = {customer: upgrade_moments(timeline) for customer, timeline in timelines.items()}
    exposed: dict[tuple[str, str, date], list[bool]] = defaultdict(list)
    for name in (pl.col("feature"), pl.lit(ANY).alias("feature")):
        firsts = good.group_by("customer_id", "plan", name, "day").agg(pl.col("occurred_at").min())
        for customer, plan, feature, day, at in firsts.iter_rows():
            moments = upgrades[customer]
            after = bisect_right(moments, at)
            exposed[plan, feature, day].append(after < len(moments) and moments[after] <= at + WINDOW_MS)
    rows = [[*key, len(found), sum(found)] for key, found in exposed.items()]
    return _frame([*KEYS["upgrade_exposures"], "exposed_customers", "upgraded_customers"], rows)


def funnel(exposures: pl.DataFrame, last: date, minimum_support: int = 30) -> pl.DataFrame:
    """marts.upgrade_funnel over the exposures up to a day: rates, lift and odds ratio of each plan and feature."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    days: dict[tuple[str, str], set[date]] = defaultdict(set)
    for plan, feature, day, exposed, upgraded in exposures.select(
        *KEYS["upgrade_exposures"], "exposed_customers", "upgraded_customers"
    ).iter_rows():
        if day <= last:
            sums[plan, feature][0] += exposed
            sums[plan, feature][1] += upgraded
            days[plan, feature].add(day)
    rows = []
    for (plan, feature), (exposed, upgraded) in sums.items():
        if feature == ANY:
            continue
        all_exposed, all_upgraded = sums[plan, ANY]
        rate, baseline = upgraded / exposed, all_upgraded / all_exposed
        stayed, upgraded_without = exposed - upgraded, all_upgraded - upgraded
        stayed_without = all_exposed - all_upgraded - stayed
        supported = exposed >= minimum_support
        odds = upgraded * stayed_without / (stayed * upgraded_without) if stayed * upgraded_without else None
        lift = rate / baseline if supported and baseline else None
        span = min(days[plan, feature]), max(days[plan, feature])
        rows.append([plan, feature, exposed, upgraded, rate, baseline, lift, odds if supported else None, supported, *span])
    values = ["upgrade_rate", "baseline_rate", "lift", "odds_ratio", "supported", "first_date", "last_date"]
    return _frame(["plan", "feature", "exposed_customer_days", "upgraded_customer_days", *values], rows)


# Use against bills


def usage_vs_billed(world: World, events: pl.DataFrame) -> pl.DataFrame:
    """What was used of what is billed by use, what invoices billed for it, and the price of the difference."""
    used = {(r["customer_id"], r["metric"], r["month"]): (r["events"], r["quantity"]) for r in by_month(world.metered).to_dicts()}
    billed = {(b.customer_id, b.metric, b.month): b for b in world.usage_bills}
    last_price: dict[tuple[str, str, date], str | None] = {}
    metric_of = {metric.event_name: metric.name for metric in METRICS}
    columns = ("customer_id", "event_name", "day", "price_id")
    metered = events.filter(pl.col("customer_id").is_not_null(), pl.col("event_name").is_in(list(metric_of)))
    for customer, name, day, price_id in metered.select(columns).iter_rows():  # sorted by time
        last_price[customer, metric_of[name], _month(day)] = price_id
    metrics = {metric.name: metric for metric in METRICS}
    rows = []
    for key in {*used, *billed}:
        number, quantity = used.get(key, (0, 0))
        bill, price_id = billed.get(key), last_price.get(key)
        currency = bill.currency if bill else PRICES[price_id].currency if price_id else None
        unit = PRICES[metered_price_id(metrics[key[1]], currency)].unit_minor if currency else None
        unbilled = quantity - (bill.quantity if bill else 0)
        money = (None, None) if unit is None else (str(unit), max(unbilled, 0) * unit)
        amount = bill.amount if bill else 0
        rows.append([*key, number, quantity, quantity - unbilled, unbilled, currency, *money, amount])
    quantities = ["used_quantity", "billed_quantity", "unbilled_quantity"]
    values = ["currency", "unit_amount_decimal", "leakage_minor", "billed_minor"]
    return _frame([*KEYS["usage_vs_billed"], "events", *quantities, *values], rows)
