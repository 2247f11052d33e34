-- marts.delinquent_feature_usage: paid features used by accounts that do not pay, and what a day of their plan would have cost.
WITH used AS (
    SELECT
        e.account, e.customer_id, CAST(timezone(r.time_zone, e.occurred_at) AS DATE) AS usage_date, e.feature, e.billing_status,
        e.plan, e.subscription_id, e.occurred_at, e.event_id, n.plan AS feature_plan
    FROM product.events AS e
    JOIN reference.entitlements AS n ON n.feature = e.feature AND n.paid
    CROSS JOIN reference.ledger AS r
    WHERE e.billing_status IN ('past_due', 'unpaid', 'canceled') AND e.event_name <> 'feature_attempted'
),
-- one day is worth one day of one subscription: the one in force at the first such use
first_use AS (
    SELECT account, customer_id, usage_date, subscription_id, plan, occurred_at
    FROM used
    QUALIFY row_number() OVER (PARTITION BY account, customer_id, usage_date ORDER BY occurred_at, event_id) = 1
),
priced AS (
    SELECT
        f.account, f.customer_id, f.usage_date, f.plan, h.currency,
        -- days in so many intervals: a month is a twelfth of 365 days
        CASE WHEN h.usage_type IS DISTINCT FROM 'metered' THEN CAST(h.unit_amount_minor * h.quantity AS HUGEINT) END
            * CASE h.billing_interval WHEN 'month' THEN 12 ELSE 1 END AS amount_minor,
        h.billing_interval_count * CASE h.billing_interval WHEN 'day' THEN 1 WHEN 'week' THEN 7 WHEN 'month' THEN 365
            WHEN 'year' THEN 365 END AS days
    FROM first_use AS f
    LEFT JOIN billing.subscription_history AS h
        ON h.account = f.account AND h.subscription_id = f.subscription_id AND h.valid_from <= f.occurred_at
        AND (h.valid_to IS NULL OR h.valid_to > f.occurred_at)
),
worth AS (
    SELECT
        account, customer_id, usage_date, plan, CASE WHEN days > 0 AND amount_minor IS NOT NULL THEN currency END AS currency,
        CASE WHEN days > 0 AND currency IS NOT NULL THEN (2 * amount_minor + days) // (2 * days) END AS day_minor
    FROM priced
),
by_feature AS (
    SELECT account, customer_id, usage_date, feature, billing_status, feature_plan, count(*) AS events
    FROM used
    GROUP BY account, customer_id, usage_date, feature, billing_status, feature_plan
),
running AS (
    SELECT
        *, sum(events) OVER w AS reached, sum(events) OVER (PARTITION BY account, customer_id, usage_date) AS whole
    FROM by_feature
    WINDOW w AS (
        PARTITION BY account, customer_id, usage_date ORDER BY feature, billing_status
        ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW
    )
)
SELECT
    b.account, b.customer_id, b.usage_date, b.feature, b.billing_status, w.plan, b.feature_plan, b.events, w.currency,
    -- the running sum is rounded down, so that the shares of a day add up to it exactly
    CAST(w.day_minor * b.reached // b.whole - w.day_minor * (b.reached - b.events) // b.whole AS BIGINT) AS leakage_minor,
    b.usage_date <= $complete_until AS complete
FROM running AS b
JOIN worth AS w ON w.account = b.account AND w.customer_id = b.customer_id AND w.usage_date = b.usage_date
