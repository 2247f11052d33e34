"""billing.charges: the last state of each charge, in event order."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import latest

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row a charge."""
    return latest(inputs, "charge", "charge_id").to_arrow()
