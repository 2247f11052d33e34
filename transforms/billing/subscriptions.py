"""billing.subscriptions: the last state of each subscription, in event order."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.subscriptions import subscription_states

INPUTS = ("billing.event_versions",)


def build(inputs: Inputs) -> pa.Table:
    """One row a subscription, canceled ones included."""
    latest = subscription_states(inputs).group_by("account", "subscription_id", maintain_order=True).last()
    return (
        latest.rename({"created_at": "updated_at", "created": "created_at"})
        .drop("sequence", "deleted", "recorded_at", "pause_collection", "plan_rank")
        .to_arrow()
    )
