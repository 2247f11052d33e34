"""billing.subscription_items: items of subscriptions, as the last state of the subscription has them."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Inputs
from transforms.versions import latest_nested

INPUTS = ("billing.object_heads",)


def build(inputs: Inputs) -> pa.Table:
    """One row a item of a subscription."""
    return latest_nested(inputs, "subscription", "items", key="subscription_item_id", parent="subscription_id").to_arrow()
