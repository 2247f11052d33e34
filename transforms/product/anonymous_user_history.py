"""product.anonymous_user_history: which user an anonymous id belongs to, by its identify events, in event time."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from lakehouse.scd2 import Roles, scd2
from lakehouse.transforms import Inputs

INPUTS = ("product.identifications",)

SCD2: Roles = {"keys": ["anonymous_id"], "time": "occurred_at", "sequence": ["received_last"], "tracked": ["user_id"]}


def states(inputs: Inputs) -> pl.DataFrame:
    """What was said of each anonymous id; of two statements of one moment the one received first counts, so it comes last."""
    said = "SELECT anonymous_id, user_id, occurred_at, -epoch_us(received_at) AS received_last FROM product.identifications"
    return pl.DataFrame(inputs.sql(said))


def build(inputs: Inputs) -> pa.Table:
    """One row an anonymous id and interval in which it belonged to one user; the last interval is open."""
    return scd2(states(inputs), **SCD2).to_arrow()
