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
# What a customer tries before it buys the plan: the funnel must find a lift exactly here.
UPGRADE_SIGNALS = {"pro": ("export_4k", "live_stream", "brand_kit"), "enterprise": ("sso", "audit_log", "custom_domain")}


@dataclass(frozen=True, slots=True)
class Price:
    """A Stripe price. `unit_minor`: cents for one seat and one interval."""

    id: str
    product_id: str
    plan: str
    currency: str
    interval: str
    unit_minor: int
    usage_type: str = "licensed"


@dataclass(frozen=True, slots=True)
class Product:
    """A Stripe product; `plan` is empty for the metered add-on."""

    id: str
    plan: str
    name: str
    description: str


PRODUCTS = (
    Product("prod_streamforge_starter", "starter", "StreamForge Starter", "Host and share video"),
    Product("prod_streamforge_pro", "pro", "StreamForge Pro", "Branding, 4K and live"),
    Product("prod_streamforge_enterprise", "enterprise", "StreamForge Enterprise", "Security and control"),
    Product("prod_streamforge_minutes", "", "StreamForge Minutes", "Extra streaming minutes, metered"),
)


def price_id(plan: str, interval: str, currency: str) -> str:
    """The id of a plan's price, e.g. `price_pro_month_usd`."""
    return f"price_{plan}_{interval}_{currency}"


def _plan_prices() -> dict[str, Price]:
    prices = {}
    for plan in PLANS:
        for interval, factor in (("month", 1), ("year", YEARLY_FACTOR)):
            for currency in CURRENCIES:
                key = price_id(plan, interval, currency)
                amount = MONTHLY_MINOR[plan] * factor
                prices[key] = Price(key, f"prod_streamforge_{plan}", plan, currency, interval, amount)
    for currency in CURRENCIES:
        key = f"price_minutes_month_{currency}"
        prices[key] = Price(key, "prod_streamforge_minutes", "", currency, "month", 2, usage_type="metered")
    return prices


PRICES = _plan_prices()
