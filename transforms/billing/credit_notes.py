"""billing.credit_notes: the last state of each credit note, in event order."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import latest

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row a credit note."""
    return latest(inputs, "credit_note", "credit_note_id").to_arrow()
