"""billing.payment_methods: the last state of each payment method, in event order."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import latest

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row a payment method."""
    return latest(inputs, "payment_method", "payment_method_id").to_arrow()
