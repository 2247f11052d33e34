"""billing.workspace_customer_history: SCD2 of the CRM map, by the time a mapping took effect."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from lakehouse.scd2 import scd2
from lakehouse.transforms import Inputs

INPUTS = ("raw.crm_workspaces",)

# A CRM row says what holds from effective_at on. So a row written later overrides whatever earlier rows said of that
# time and after: a version is dropped if a later one took effect at or before it.
IN_FORCE = """
SELECT workspace_id, 'platform' AS account, customer_id, effective_at, deleted OR customer_id IS NULL AS unmapped
FROM raw.crm_workspaces
QUALIFY coalesce(
    min(effective_at) OVER (
        PARTITION BY workspace_id ORDER BY updated_at DESC, "offset" DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    ) > effective_at,
    true
)
"""


def build(inputs: Inputs) -> pa.Table:
    """One row a workspace and interval; while it is mapped to nobody there is a gap."""
    return scd2(
        pl.DataFrame(inputs.sql(IN_FORCE)),
        keys=["workspace_id"],
        time="effective_at",
        tracked=["account", "customer_id"],
        deleted="unmapped",
    ).to_arrow()
