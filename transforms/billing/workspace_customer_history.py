"""billing.workspace_customer_history: SCD2 of the CRM map, by the time a mapping took effect."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from lakehouse.sole import sole
from lakehouse.transforms import Inputs
from transforms.crm import intervals

INPUTS = ("raw.crm_workspaces",)

# A CRM with one row a workspace has no id of the mapping: a new customer in that row is a move. Two rows are two statements.
ROW = ("workspace_id", "coalesce(mapping_id, '') AS mapping")


def build(inputs: Inputs) -> pa.Table:
    """One row a workspace and interval: its customer, or none while several rows name different ones; a gap while it has none."""
    mapped = intervals(inputs, "raw.crm_workspaces", ROW, ["customer_id"])
    found = sole(mapped, keys=["workspace_id"], values=["customer_id"], count="customers")
    return found.with_columns(pl.lit("platform").alias("account")).to_arrow()
