"""billing.customers: the last state of each Stripe customer, in event order."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import KEYS, ordered_versions

INPUTS = ("billing.event_versions",)

COLUMNS = {
    "email": "VARCHAR",
    "name": "VARCHAR",
    "country": "VARCHAR",
    "currency": "VARCHAR",
    "delinquent": "BOOLEAN",
    "created": "BIGINT",
}


def build(inputs: Inputs) -> pa.Table:
    """One row a customer; a deleted customer stays, marked. A deletion event carries little: the rest is as last carried."""
    latest = ordered_versions(inputs, "customer", COLUMNS).group_by(KEYS, maintain_order=True).last()
    created = pl.from_epoch("created", "s").dt.replace_time_zone("UTC")
    return latest.select(
        "account",
        pl.col("object_id").alias("customer_id"),
        "email",
        "name",
        "country",
        "currency",
        "delinquent",
        # a customer whose creation was never received is known from its first event on
        pl.coalesce(created, "created_at").alias("created_at"),
        pl.col("created_at").alias("updated_at"),
        "deleted",
    ).to_arrow()
