"""billing.refunds: the last state of each refund, in event order."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import latest

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row a refund."""
    return latest(inputs, "refund", "refund_id").to_arrow()
