"""billing.subscription_item_history: SCD2 of the items of subscriptions in event time."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from lakehouse.scd2 import Roles, scd2
from lakehouse.transforms import Inputs
from transforms.versions import ordered_versions, unnested

INPUTS = ("billing.event_versions",)

TRACKED = (
    "price_id",
    "product_id",
    "quantity",
    "currency",
    "unit_amount_minor",
    "unit_amount_decimal",
    "billing_interval",
    "billing_interval_count",
    "usage_type",
    "discounts",
)

SCD2: Roles = {
    "keys": ["account", "subscription_id", "subscription_item_id"],
    "time": "created_at",
    "sequence": ["sequence"],
    "tracked": TRACKED,
    "deleted": "removed",
}


def states(inputs: Inputs) -> pl.DataFrame:
    """Every state of every item: an event lists the items of its subscription, so one that it does not list is not there then."""
    versions = ordered_versions(inputs, "subscription", [], ["items"]).filter(pl.col("items").is_not_null())
    of_version = ["account", "object_id", "created_at", "sequence"]
    listed = unnested(inputs, versions, "subscription", "items").filter(pl.col("subscription_item_id").is_not_null())
    item = ["account", "object_id", "subscription_item_id"]
    # an item that is listed twice in one event counts once
    listed = listed.unique([*of_version, "subscription_item_id"], keep="first", maintain_order=True)
    every = versions.select(of_version).join(listed.select(item).unique(), on=["account", "object_id"])
    return (
        every.join(
            listed.with_columns(pl.lit(value=False).alias("removed")), on=[*of_version, "subscription_item_id"], how="left"
        )
        .with_columns(pl.col("removed").fill_null(value=True))
        .rename({"object_id": "subscription_id"})
    )


def build(inputs: Inputs) -> pa.Table:
    """One row an item and interval in which no tracked column changed; while it is removed there is a gap."""
    return scd2(states(inputs), **SCD2).to_arrow()
