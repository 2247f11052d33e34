"""billing.customer_history: SCD2 of Stripe customers in event time."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from lakehouse.scd2 import Roles, scd2
from lakehouse.transforms import Inputs
from transforms.versions import ordered_versions

INPUTS = ("billing.event_versions",)

TRACKED = (
    "email",
    "name",
    "country",
    "currency",
    "delinquent",
    "balance_minor",
    "tax_exempt",
    "default_payment_method_id",
    "default_source_id",
)

SCD2: Roles = {
    "keys": ["account", "customer_id"],
    "time": "created_at",
    "sequence": ["sequence"],
    "tracked": TRACKED,
    "deleted": "deleted",
}


def states(inputs: Inputs) -> pl.DataFrame:
    """Every state of every customer."""
    return ordered_versions(inputs, "customer", TRACKED).rename({"object_id": "customer_id"})


def build(inputs: Inputs) -> pa.Table:
    """One row a customer and interval in which no tracked column changed; it ends with the customer's deletion."""
    return scd2(states(inputs), **SCD2).to_arrow()
