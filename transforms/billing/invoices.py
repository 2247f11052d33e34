"""billing.invoices: the last state of each invoice, in event order."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import latest

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row an invoice."""
    return latest(inputs, "invoice", "invoice_id").to_arrow()
