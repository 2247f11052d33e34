"""billing.price_history: SCD2 of Stripe prices in event time."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from lakehouse.scd2 import Roles, scd2
from lakehouse.transforms import Inputs
from transforms.versions import ordered_versions

INPUTS = ("billing.event_versions",)

TRACKED = (
    "product_id",
    "active",
    "lookup_key",
    "price_type",
    "currency",
    "unit_amount_minor",
    "unit_amount_decimal",
    "billing_scheme",
    "tiers_mode",
    "usage_type",
    "billing_interval",
    "billing_interval_count",
    "tax_behavior",
)

SCD2: Roles = {
    "keys": ["account", "price_id"],
    "time": "created_at",
    "sequence": ["sequence"],
    "tracked": TRACKED,
    "untracked": ["nickname"],
    "deleted": "deleted",
}


def states(inputs: Inputs) -> pl.DataFrame:
    """Every state of every price."""
    return ordered_versions(inputs, "price", [*TRACKED, "nickname"]).rename({"object_id": "price_id"})


def build(inputs: Inputs) -> pa.Table:
    """One row a price and interval in which no tracked column changed; it ends with the price's deletion."""
    return scd2(states(inputs), **SCD2).to_arrow()
