"""billing.balance_transactions: the last state of each balance transaction, in event order."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import latest

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row a balance transaction."""
    return latest(inputs, "balance_transaction", "balance_transaction_id").to_arrow()
