"""Subscription states in event order, with plan and billing status: shared by the current and the history table."""

from __future__ import annotations

import polars as pl

from lakehouse.transforms import Inputs
from transforms.versions import ordered_versions

COLUMNS = {
    "customer_id": "VARCHAR",
    "status": "VARCHAR",
    "price_id": "VARCHAR",
    "product_id": "VARCHAR",
    "quantity": "BIGINT",
    "currency": "VARCHAR",
    "unit_amount": "BIGINT",
    "billing_interval": "VARCHAR",
    "billing_interval_count": "BIGINT",
    "cancel_at_period_end": "BOOLEAN",
    "pause_collection": "VARCHAR",
    "current_period_start": "BIGINT",
    "current_period_end": "BIGINT",
    "trial_end": "BIGINT",
    "start_date": "BIGINT",
    "canceled_at": "BIGINT",
    "ended_at": "BIGINT",
}
TIMES = ("current_period_start", "current_period_end", "trial_end", "start_date", "canceled_at", "ended_at")


def subscription_states(inputs: Inputs) -> pl.DataFrame:
    """Every state of every subscription: the columns above (times as UTC timestamps), plan, plan_rank, billing_status.

    Sorted by account, subscription_id, created_at, sequence.
    """
    states = ordered_versions(inputs, "subscription", COLUMNS)
    plans = pl.DataFrame(inputs.reference("plans"))
    statuses = pl.DataFrame(inputs.reference("statuses")).select("status", "billing_status")
    return (
        states.rename({"object_id": "subscription_id", "unit_amount": "unit_amount_minor", "start_date": "started_at"})
        .with_columns(
            [
                pl.from_epoch(c, "s").dt.cast_time_unit("us").dt.replace_time_zone("UTC")
                for c in (*(t for t in TIMES if t != "start_date"), "started_at")
            ]
        )
        .with_columns(
            pl.col("pause_collection").is_not_null().alias("collection_paused"),
            pl.col("cancel_at_period_end").fill_null(value=False),
        )
        .join(plans, on="product_id", how="left", maintain_order="left")
        .join(statuses, on="status", how="left", maintain_order="left")
    )
