-- billing.mrr_movements: how each customer's monthly recurring revenue changed, by day and currency.
-- An interval of a subscription adds its monthly value on the day it begins and takes it away on the day it ends; summed up by
-- day that is the MRR at the end of each day, so the movements add up to it by construction.
WITH monthly AS (
    SELECT
        h.account, h.customer_id, h.currency, h.valid_from, h.valid_to,
        -- in integers, rounded half up, each subscription by itself; of a week or day, a month is a twelfth of 52 or 365
        (2 * h.unit_amount_minor * h.quantity
            * CASE h.billing_interval WHEN 'month' THEN 1 WHEN 'year' THEN 1 WHEN 'week' THEN 52 WHEN 'day' THEN 365 END
            + h.billing_interval_count * CASE h.billing_interval WHEN 'month' THEN 1 ELSE 12 END)
        // (2 * h.billing_interval_count * CASE h.billing_interval WHEN 'month' THEN 1 ELSE 12 END) AS value_minor
    FROM billing.subscription_history AS h
    CROSS JOIN reference.mrr AS r
    WHERE list_contains(r.counted_statuses, h.status) AND (r.count_paused_collection OR NOT h.collection_paused)
        AND (r.count_metered OR h.usage_type IS DISTINCT FROM 'metered')
),
steps AS (
    SELECT account, customer_id, currency, valid_from AS at, value_minor FROM monthly
    UNION ALL
    SELECT account, customer_id, currency, valid_to AS at, -value_minor FROM monthly WHERE valid_to IS NOT NULL
),
days AS (
    SELECT
        s.account, s.customer_id, s.currency, CAST(timezone(l.time_zone, s.at) AS DATE) AS movement_date,
        CAST(sum(s.value_minor) AS BIGINT) AS change_minor
    FROM steps AS s
    CROSS JOIN reference.ledger AS l
    WHERE s.value_minor IS NOT NULL AND s.currency IS NOT NULL
    GROUP BY s.account, s.customer_id, s.currency, CAST(timezone(l.time_zone, s.at) AS DATE)
    HAVING sum(s.value_minor) <> 0
),
summed AS (
    SELECT
        account, customer_id, currency, movement_date, change_minor,
        CAST(sum(change_minor) OVER w AS BIGINT) AS after_minor,
        row_number() OVER w AS movement_number
    FROM days
    WINDOW w AS (PARTITION BY account, customer_id, currency ORDER BY movement_date)
)
SELECT
    account, customer_id, currency, movement_date,
    CASE
        WHEN movement_number = 1 THEN 'new'
        WHEN after_minor = change_minor THEN 'reactivation'
        WHEN after_minor = 0 THEN 'churn'
        WHEN change_minor > 0 THEN 'expansion'
        ELSE 'contraction'
    END AS movement,
    after_minor - change_minor AS before_minor, after_minor, change_minor
FROM summed
