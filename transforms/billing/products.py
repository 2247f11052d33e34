"""billing.products: the last state of each product, in event order."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import latest

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row a product."""
    return latest(inputs, "product", "product_id").to_arrow()
