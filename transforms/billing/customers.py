"""billing.customers: the last state of each Stripe customer, in event order."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import latest

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row a customer; a deleted customer stays, marked."""
    return latest(inputs, "customer", "customer_id").to_arrow()
