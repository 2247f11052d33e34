"""product.user_workspace_history: of each user and interval the one workspace that it belongs to, by the CRM's memberships."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.sole import sole
from lakehouse.transforms import Inputs
from transforms.crm import intervals

INPUTS = ("raw.crm_memberships",)


def build(inputs: Inputs) -> pa.Table:
    """One row a user and interval: its workspace, or none while it belongs to several; a gap while it belongs to none."""
    members = intervals(inputs, "raw.crm_memberships", ["user_id", "workspace_id"], [])
    return sole(members, keys=["user_id"], values=["workspace_id"], count="workspaces").to_arrow()
