"""Subscription states, with plan, billing status and monthly value: of the current and the history table."""

from __future__ import annotations

import polars as pl

from lakehouse.plans import frame
from lakehouse.transforms import Inputs
from transforms.versions import unnested

VERSION = ["account", "object_id", "created_at", "sequence"]

MONTHLY = """
WITH a_year AS (
    SELECT
        account, object_id, created_at, sequence,
        {count_metered} OR usage_type IS DISTINCT FROM 'metered' AS counts,
        -- in trillionths of a minor unit: Stripe gives up to twelve decimals. A year has 12 months, 52 weeks or 365 days
        try(
            CAST(coalesce(CAST(unit_amount_decimal AS DECIMAL(38, 12)), unit_amount_minor) * 1000000000000 AS HUGEINT) * quantity
            * CASE billing_interval WHEN 'month' THEN 12 WHEN 'year' THEN 1 WHEN 'week' THEN 52 WHEN 'day' THEN 365 END
        ) AS value,
        CAST(billing_interval_count AS HUGEINT) * 12000000000000 AS months
    FROM __items
)
SELECT
    account, object_id, created_at, sequence,
    CASE WHEN bool_or(counts) THEN TRY_CAST(sum((2 * value + months) // (2 * months)) FILTER (WHERE counts) AS BIGINT) ELSE 0 END
        AS monthly_minor
FROM a_year
GROUP BY account, object_id, created_at, sequence
"""


def subscription_states(inputs: Inputs, versions: pl.DataFrame) -> pl.DataFrame:
    """What each version of a subscription says (columns: catalog/reference/stripe_objects.yaml), and what follows from it.

    versions: of transforms/versions.py, with every column and the list `items`.

    plan, plan_rank; billing_status; monthly_minor: the monthly value of all its items that count (catalog/reference/mrr.yaml),
    each rounded half up; 0 if none counts, NULL if no price of those that do is known.

    In the order of the versions.
    """
    plans = pl.DataFrame(inputs.reference("plans"))
    statuses = pl.DataFrame(inputs.reference("statuses")).select("status", "billing_status")
    # of a single item the subscription's own columns say it all, unless its price is a fraction of a minor unit
    first, second = (pl.col("items").str.json_path_match(f"$[{i}]").is_not_null() for i in (0, 1))
    parted = versions.select(second | (first & pl.col("unit_amount_minor").is_null())).to_series().fill_null(value=False)
    items = unnested(inputs, versions.filter(parted), "subscription", "items")
    monthly = _monthly(inputs, pl.concat([versions.filter(~parted), items], how="diagonal_relaxed"))
    return (
        versions.drop("items")
        .join(monthly, on=VERSION, how="left", maintain_order="left")
        .rename({"object_id": "subscription_id"})
        .with_columns(
            pl.col("pause_collection").is_not_null().alias("collection_paused"),
            pl.col("cancel_at_period_end").fill_null(value=False),
        )
        .join(plans, on="product_id", how="left", maintain_order="left")
        .join(statuses, on="status", how="left", maintain_order="left")
    )


def _monthly(inputs: Inputs, items: pl.DataFrame) -> pl.DataFrame:
    """Columns VERSION, monthly_minor of items (VERSION, and how each is priced)."""
    (mrr,) = inputs.reference("mrr")
    inputs.connection.register("__items", items.to_arrow())
    return frame(inputs.connection, MONTHLY.format(count_metered=bool(mrr["count_metered"])))
