-- marts.mrr_movements: billing.mrr_movements by month and plan. Each movement is in one cell, so the cells sum to the change of MRR.
WITH movements AS (
    SELECT
        account, customer_id, currency, CAST(date_trunc('month', movement_date) AS DATE) AS month,
        coalesce(plan, 'unknown') AS plan, movement, change_minor
    FROM billing.mrr_movements
)
SELECT
    account, currency, month, plan,
    CAST(coalesce(sum(change_minor) FILTER (WHERE movement = 'new'), 0) AS BIGINT) AS new_minor,
    CAST(coalesce(sum(change_minor) FILTER (WHERE movement = 'expansion'), 0) AS BIGINT) AS expansion_minor,
    CAST(coalesce(sum(change_minor) FILTER (WHERE movement = 'contraction'), 0) AS BIGINT) AS contraction_minor,
    CAST(coalesce(sum(change_minor) FILTER (WHERE movement = 'churn'), 0) AS BIGINT) AS churn_minor,
    CAST(coalesce(sum(change_minor) FILTER (WHERE movement = 'reactivation'), 0) AS BIGINT) AS reactivation_minor,
    CAST(sum(change_minor) AS BIGINT) AS change_minor, count(*) AS movements, count(DISTINCT customer_id) AS customers,
    month + INTERVAL 1 MONTH <= $complete_until + INTERVAL 1 DAY AS complete
FROM movements
GROUP BY account, currency, month, plan
