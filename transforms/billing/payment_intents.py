"""billing.payment_intents: the last state of each payment intent, in event order."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import latest

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row a payment intent."""
    return latest(inputs, "payment_intent", "payment_intent_id").to_arrow()
