-- marts.revenue_daily: the ledger in two readings, and beside it what the customers who pay in the currency did that day.
-- An entry is booked on its posting day and restated on the day whose revenue it is, so it counts once in each reading.
WITH entries AS (
    SELECT
        l.account, l.currency, l.posting_date, CAST(timezone(r.time_zone, l.effective_at) AS DATE) AS effective_date, l.basis,
        l.amount_minor,
        CASE
            WHEN l.entry_type = 'charge' THEN 'gross'
            WHEN l.entry_type IN ('refund', 'refund_failed', 'refund_canceled') THEN 'refunds'
            WHEN l.entry_type IN ('dispute_withdrawn', 'dispute_reinstated') THEN 'disputes'
            WHEN l.entry_type IN ('fee', 'dispute_fee') THEN 'fees'
        END AS measure
    FROM billing.revenue_ledger AS l
    CROSS JOIN reference.ledger AS r
),
found AS (
    SELECT
        account, currency, posting_date AS revenue_date, 'booked' AS reading, basis, measure, amount_minor, NULL AS customer_id,
        0 AS workspaces, 0 AS events
    FROM entries
    UNION ALL
    SELECT account, currency, effective_date AS revenue_date, 'restated', basis, measure, amount_minor, NULL, 0, 0
    FROM entries
    WHERE effective_date IS NOT NULL
    UNION ALL
    SELECT w.account, p.currency, w.activity_date AS revenue_date, 'used', NULL, NULL, NULL, w.customer_id, 1, w.events
    FROM marts.workspace_engagement_daily AS w
    JOIN billing.prices AS p ON p.account = w.account AND p.price_id = w.price_id
    WHERE p.currency IS NOT NULL
)
SELECT
    account, currency, revenue_date,
    CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'booked' AND measure = 'gross'), 0) AS BIGINT) AS booked_gross_minor,
    CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'booked' AND measure = 'refunds'), 0) AS BIGINT) AS booked_refunds_minor,
    CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'booked' AND measure = 'disputes'), 0) AS BIGINT) AS booked_disputes_minor,
    CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'booked' AND measure = 'fees'), 0) AS BIGINT) AS booked_fees_minor,
    CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'booked' AND basis = 'cash'), 0) AS BIGINT) AS booked_net_minor,
    CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'restated' AND measure = 'gross'), 0) AS BIGINT) AS restated_gross_minor,
    CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'restated' AND measure = 'refunds'), 0) AS BIGINT) AS restated_refunds_minor,
    CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'restated' AND measure = 'disputes'), 0) AS BIGINT) AS restated_disputes_minor,
    CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'restated' AND measure = 'fees'), 0) AS BIGINT) AS restated_fees_minor,
    CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'restated' AND basis = 'cash'), 0) AS BIGINT) AS restated_net_minor,
    CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'booked' AND basis = 'billed'), 0) AS BIGINT) AS booked_billed_minor,
    CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'restated' AND basis = 'billed'), 0) AS BIGINT) AS restated_billed_minor,
    count(DISTINCT customer_id) AS active_customers, CAST(sum(workspaces) AS BIGINT) AS active_workspaces,
    CAST(sum(events) AS BIGINT) AS events, revenue_date <= $complete_until AS complete
FROM found
GROUP BY account, currency, revenue_date
