-- marts.revenue_daily: the ledger in two readings, and beside it what the customers who pay in the currency did that day.
-- An entry is booked on its posting day and restated on the day whose revenue it is, so it counts once in each reading.
WITH entries AS (
    SELECT l.account, l.currency, l.posting_date AS revenue_date, 'booked' AS reading, l.basis, l.entry_type, l.amount_minor
    FROM billing.revenue_ledger AS l
    UNION ALL
    SELECT
        l.account, l.currency, CAST(timezone(r.time_zone, l.effective_at) AS DATE) AS revenue_date, 'restated' AS reading, l.basis,
        l.entry_type, l.amount_minor
    FROM billing.revenue_ledger AS l
    CROSS JOIN reference.ledger AS r
    WHERE l.effective_at IS NOT NULL
),
money AS (
    SELECT
        account, currency, revenue_date,
        CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'booked' AND entry_type IN ('charge')), 0) AS BIGINT) AS booked_gross_minor,
        CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'booked' AND entry_type IN ('refund', 'refund_failed', 'refund_canceled')), 0) AS BIGINT) AS booked_refunds_minor,
        CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'booked' AND entry_type IN ('dispute_withdrawn', 'dispute_reinstated')), 0) AS BIGINT) AS booked_disputes_minor,
        CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'booked' AND entry_type IN ('fee', 'dispute_fee')), 0) AS BIGINT) AS booked_fees_minor,
        CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'booked' AND basis = 'cash'), 0) AS BIGINT) AS booked_net_minor,
        CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'restated' AND entry_type IN ('charge')), 0) AS BIGINT) AS restated_gross_minor,
        CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'restated' AND entry_type IN ('refund', 'refund_failed', 'refund_canceled')), 0) AS BIGINT) AS restated_refunds_minor,
        CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'restated' AND entry_type IN ('dispute_withdrawn', 'dispute_reinstated')), 0) AS BIGINT) AS restated_disputes_minor,
        CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'restated' AND entry_type IN ('fee', 'dispute_fee')), 0) AS BIGINT) AS restated_fees_minor,
        CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'restated' AND basis = 'cash'), 0) AS BIGINT) AS restated_net_minor,
        CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'booked' AND basis = 'billed'), 0) AS BIGINT) AS booked_billed_minor,
        CAST(coalesce(sum(amount_minor) FILTER (WHERE reading = 'restated' AND basis = 'billed'), 0) AS BIGINT) AS restated_billed_minor
    FROM entries
    GROUP BY account, currency, revenue_date
),
engaged AS (
    SELECT
        w.account, p.currency, w.activity_date AS revenue_date, count(DISTINCT w.customer_id) AS active_customers,
        count(*) AS active_workspaces, CAST(sum(w.events) AS BIGINT) AS events
    FROM marts.workspace_engagement_daily AS w
    JOIN billing.prices AS p ON p.account = w.account AND p.price_id = w.price_id
    WHERE p.currency IS NOT NULL
    GROUP BY w.account, p.currency, w.activity_date
)
SELECT
    coalesce(m.account, e.account) AS account, coalesce(m.currency, e.currency) AS currency,
    coalesce(m.revenue_date, e.revenue_date) AS revenue_date,
    coalesce(m.booked_gross_minor, 0) AS booked_gross_minor,
    coalesce(m.booked_refunds_minor, 0) AS booked_refunds_minor,
    coalesce(m.booked_disputes_minor, 0) AS booked_disputes_minor,
    coalesce(m.booked_fees_minor, 0) AS booked_fees_minor,
    coalesce(m.booked_net_minor, 0) AS booked_net_minor,
    coalesce(m.restated_gross_minor, 0) AS restated_gross_minor,
    coalesce(m.restated_refunds_minor, 0) AS restated_refunds_minor,
    coalesce(m.restated_disputes_minor, 0) AS restated_disputes_minor,
    coalesce(m.restated_fees_minor, 0) AS restated_fees_minor,
    coalesce(m.restated_net_minor, 0) AS restated_net_minor,
    coalesce(m.booked_billed_minor, 0) AS booked_billed_minor,
    coalesce(m.restated_billed_minor, 0) AS restated_billed_minor,
    coalesce(e.active_customers, 0) AS active_customers, coalesce(e.active_workspaces, 0) AS active_workspaces,
    coalesce(e.events, 0) AS events, coalesce(m.revenue_date, e.revenue_date) <= $complete_until AS complete
FROM money AS m
FULL JOIN engaged AS e ON e.account = m.account AND e.currency = m.currency AND e.revenue_date = m.revenue_date
