"""billing.invoice_line_items: lines of invoices, as the last state of the invoice has them."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import latest_nested

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row a line of an invoice."""
    return latest_nested(inputs, "invoice", "lines", key="line_item_id", parent="invoice_id").to_arrow()
