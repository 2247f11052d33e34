"""billing.subscriptions: the last state of each subscription, in event order."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.subscriptions import subscription_states
from transforms.versions import last_versions

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row a subscription, canceled ones included."""
    latest = last_versions(inputs, "subscription", lists=["items"])
    return (
        subscription_states(inputs, latest)
        .rename({"created_at": "updated_at", "created": "created_at"})
        .drop("sequence", "deleted", "recorded_at", "pause_collection", "plan_rank")
        .to_arrow()
    )
