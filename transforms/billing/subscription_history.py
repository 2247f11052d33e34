"""billing.subscription_history: SCD2 of subscriptions in event time."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from lakehouse.scd2 import Roles, scd2
from lakehouse.transforms import Inputs
from transforms.subscriptions import subscription_states
from transforms.versions import ordered_versions

INPUTS = ("billing.event_versions",)

TRACKED = (
    "customer_id",
    "status",
    "billing_status",
    "price_id",
    "product_id",
    "plan",
    "plan_rank",
    "quantity",
    "cancel_at_period_end",
    "collection_paused",
    "currency",
    "unit_amount_minor",
    "billing_interval",
    "billing_interval_count",
    "usage_type",
    "monthly_minor",
)

SCD2: Roles = {
    "keys": ["account", "subscription_id"],
    "time": "created_at",
    "sequence": ["sequence"],
    "tracked": TRACKED,
    "untracked": ["started_at"],
}


def states(inputs: Inputs) -> pl.DataFrame:
    """Every state of every subscription."""
    return subscription_states(inputs, ordered_versions(inputs, "subscription", lists=["items"]))


def build(inputs: Inputs) -> pa.Table:
    """One row a subscription and interval in which no tracked column changed."""
    return scd2(states(inputs), **SCD2).to_arrow()
