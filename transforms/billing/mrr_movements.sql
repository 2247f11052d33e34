-- billing.mrr_movements: how each customer's monthly recurring revenue changed, by day and currency.
-- An interval of a subscription adds its monthly value on the day it begins and takes it away on the day it ends; summed up by
-- day that is the MRR at the end of each day, so the movements add up to it by construction.
WITH monthly AS (
    SELECT
        h.account, h.customer_id, h.currency, h.plan, h.plan_rank, h.valid_from, h.valid_to, h.monthly_minor AS value_minor
    FROM billing.subscription_history AS h
    CROSS JOIN reference.mrr AS r
    WHERE list_contains(r.counted_statuses, h.status) AND (r.count_paused_collection OR NOT h.collection_paused)
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
),
-- a movement belongs to the highest plan that counts at the end of its day; where nothing is left, to what ended
plans AS (
    SELECT s.account, s.customer_id, s.currency, s.movement_date, m.plan
    FROM summed AS s
    CROSS JOIN reference.ledger AS l
    JOIN monthly AS m
        ON m.account = s.account AND m.customer_id = s.customer_id AND m.currency = s.currency AND m.value_minor > 0
        AND CAST(timezone(l.time_zone, m.valid_from) AS DATE) <= s.movement_date
        AND (m.valid_to IS NULL OR CAST(timezone(l.time_zone, m.valid_to) AS DATE) >= s.movement_date)
    QUALIFY row_number() OVER (
        PARTITION BY s.account, s.customer_id, s.currency, s.movement_date
        ORDER BY coalesce(CAST(timezone(l.time_zone, m.valid_to) AS DATE) > s.movement_date, true) DESC,
            coalesce(m.plan_rank, 0) DESC, m.plan
    ) = 1
)
SELECT
    s.account, s.customer_id, s.currency, s.movement_date,
    CASE
        WHEN movement_number = 1 THEN 'new'
        WHEN after_minor = change_minor THEN 'reactivation'
        WHEN after_minor = 0 THEN 'churn'
        WHEN change_minor > 0 THEN 'expansion'
        ELSE 'contraction'
    END AS movement,
    after_minor - change_minor AS before_minor, after_minor, change_minor, p.plan
FROM summed AS s
LEFT JOIN plans AS p
    ON p.account = s.account AND p.customer_id = s.customer_id AND p.currency = s.currency AND p.movement_date = s.movement_date
