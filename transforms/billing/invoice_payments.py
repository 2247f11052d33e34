"""billing.invoice_payments: the last state of each invoice payment, in event order."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import latest

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row a payment of an invoice."""
    return latest(inputs, "invoice_payment", "invoice_payment_id").to_arrow()
