-- marts.arpa_by_cohort: MRR per paying customer at the end of each month, by cohort and by the days of use in that month.
WITH months AS (
    SELECT account, CAST(date_trunc('month', activity_date) AS DATE) AS month
    FROM marts.workspace_engagement_daily
    WHERE customer_id IS NOT NULL
    UNION
    SELECT account, CAST(date_trunc('month', movement_date) AS DATE) AS month FROM billing.mrr_movements
),
cohorts AS (
    SELECT account, customer_id, currency, CAST(date_trunc('month', min(movement_date)) AS DATE) AS cohort_month
    FROM billing.mrr_movements
    GROUP BY account, customer_id, currency
),
-- a movement holds until the next one: the last up to the end of a month is what the customer paid then
standing AS (
    SELECT m.account, m.month, v.customer_id, v.currency, v.after_minor
    FROM months AS m
    JOIN billing.mrr_movements AS v ON v.account = m.account AND v.movement_date < m.month + INTERVAL 1 MONTH
    QUALIFY row_number() OVER (PARTITION BY m.account, m.month, v.customer_id, v.currency ORDER BY v.movement_date DESC) = 1
),
active AS (
    SELECT
        account, customer_id, CAST(date_trunc('month', activity_date) AS DATE) AS month, count(DISTINCT activity_date) AS active_days
    FROM marts.workspace_engagement_daily
    WHERE customer_id IS NOT NULL
    GROUP BY account, customer_id, CAST(date_trunc('month', activity_date) AS DATE)
),
paying AS (
    SELECT
        s.account, s.currency, s.month, c.cohort_month, i.usage_intensity, coalesce(a.active_days, 0) AS active_days, s.after_minor
    FROM standing AS s
    JOIN cohorts AS c ON c.account = s.account AND c.customer_id = s.customer_id AND c.currency = s.currency
    LEFT JOIN active AS a ON a.account = s.account AND a.customer_id = s.customer_id AND a.month = s.month
    JOIN reference.usage_intensity AS i ON coalesce(a.active_days, 0) BETWEEN i.from_days AND i.to_days
    WHERE s.after_minor > 0
)
SELECT
    account, currency, month, cohort_month, usage_intensity, count(*) AS customers, CAST(sum(active_days) AS BIGINT) AS active_days,
    CAST(sum(after_minor) AS BIGINT) AS mrr_minor,
    CAST((2 * sum(after_minor) + count(*)) // (2 * count(*)) AS BIGINT) AS arpa_minor,
    month + INTERVAL 1 MONTH <= $complete_until + INTERVAL 1 DAY AS complete
FROM paying
GROUP BY account, currency, month, cohort_month, usage_intensity
