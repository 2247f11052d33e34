"""billing.prices: the last state of each price, in event order."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import latest

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row a price."""
    return latest(inputs, "price", "price_id").to_arrow()
