"""What StreamForge sells: plans, prices and the features of each plan. Amounts are integer minor units."""

from __future__ import annotations

from dataclasses import dataclass

PLAN_RANK = {"starter": 1, "pro": 2, "enterprise": 3}
PLANS = tuple(PLAN_RANK)
MONTHLY_MINOR = {"starter": 4_900, "pro": 19_900, "enterprise": 99_900}
YEARLY_FACTOR = 10
CURRENCIES = ("usd", "eur")

PLAN_FEATURES = {
    "starter": ("upload", "playback", "share_link", "comments", "captions", "basic_analytics"),
    "pro": ("brand_kit", "export_4k", "advanced_analytics", "live_stream", "api_access"),
    "enterprise": ("sso", "audit_log", "drm", "custom_domain"),
}
FEATURES = tuple(feature for plan in PLANS for feature in PLAN_FEATURES[plan])
# Open to everybody, so that what was shared goes on working.
FREE_FEATURES = ("playback", "comments")
# What a customer tries before it buys the plan: the funnel must find a lift exactly here.
UPGRADE_SIGNALS = {"pro": ("export_4k", "live_stream", "brand_kit"), "enterprise": ("sso", "audit_log", "custom_domain")}


@dataclass(frozen=True, slots=True)
class Price:
    """A Stripe price. `unit_minor`: cents for one seat and one interval; without an interval, for one unit of what is metered."""

    id: str
    product_id: str
    plan: str
    currency: str
    interval: str
    unit_minor: int


@dataclass(frozen=True, slots=True)
class Product:
    """A Stripe product; `plan` is empty for what is billed by use."""

    id: str
    plan: str
    name: str
    description: str
    unit: str = "seat"


@dataclass(frozen=True, slots=True)
class Metric:
    """What is billed by use: the events that count, the number in their properties, and how much of it is one unit."""

    name: str
    event_name: str
    measure: str
    per_unit: int
    product: str
    unit_minor: int


METRICS = (
    Metric("minutes_streamed", "video_played", "duration_ms", 60_000, "minutes", 2),
    Metric("storage_gb", "upload_completed", "bytes", 1_000_000_000, "storage", 7),
)

PRODUCTS = (
    Product("prod_streamforge_starter", "starter", "StreamForge Starter", "Host and share video"),
    Product("prod_streamforge_pro", "pro", "StreamForge Pro", "Branding, 4K and live"),
    Product("prod_streamforge_enterprise", "enterprise", "StreamForge Enterprise", "Security and control"),
    Product("prod_streamforge_minutes", "", "StreamForge Minutes", "Minutes streamed", "minute"),
    Product("prod_streamforge_storage", "", "StreamForge Storage", "Gigabytes uploaded", "gigabyte"),
)


def price_id(plan: str, interval: str, currency: str) -> str:
    """The id of a plan's price, e.g. `price_pro_month_usd`."""
    return f"price_{plan}_{interval}_{currency}"


def metered_price_id(metric: Metric, currency: str) -> str:
    """The id of the price of one unit of what is billed by use, e.g. `price_minutes_usd`."""
    return f"price_{metric.product}_{currency}"


def _prices() -> dict[str, Price]:
    prices = {}
    for plan in PLANS:
        for interval, factor in (("month", 1), ("year", YEARLY_FACTOR)):
            for currency in CURRENCIES:
                key = price_id(plan, interval, currency)
                amount = MONTHLY_MINOR[plan] * factor
                prices[key] = Price(key, f"prod_streamforge_{plan}", plan, currency, interval, amount)
    for metric in METRICS:
        for currency in CURRENCIES:
            key = metered_price_id(metric, currency)
            prices[key] = Price(key, f"prod_streamforge_{metric.product}", "", currency, "", metric.unit_minor)
    return prices


PRICES = _prices()
