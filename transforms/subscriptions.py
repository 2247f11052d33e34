"""Subscription states in event order, with plan and billing status: shared by the current and the history table."""

from __future__ import annotations

import polars as pl

from lakehouse.transforms import Inputs
from transforms.versions import ordered_versions


def subscription_states(inputs: Inputs) -> pl.DataFrame:
    """Every state of every subscription: its columns in catalog/reference/stripe_objects.yaml, plan, plan_rank, billing_status.

    Sorted by account, subscription_id, created_at (of the event), sequence.
    """
    plans = pl.DataFrame(inputs.reference("plans"))
    statuses = pl.DataFrame(inputs.reference("statuses")).select("status", "billing_status")
    return (
        ordered_versions(inputs, "subscription")
        .rename({"object_id": "subscription_id"})
        .with_columns(
            pl.col("pause_collection").is_not_null().alias("collection_paused"),
            pl.col("cancel_at_period_end").fill_null(value=False),
        )
        .join(plans, on="product_id", how="left", maintain_order="left")
        .join(statuses, on="status", how="left", maintain_order="left")
    )
