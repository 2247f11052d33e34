-- marts.workspace_engagement_daily: what each workspace did on each day. Whose it was is what its last event of the day says, so
-- that a workspace that changes hands has one row a day.
WITH used AS (
    SELECT
        e.workspace_id, e.event_id, e.occurred_at, e.account, e.customer_id, e.plan, e.price_id, e.billing_status, e.user_id,
        e.session_id, e.feature, CAST(timezone(r.time_zone, e.occurred_at) AS DATE) AS activity_date
    FROM product.events AS e
    CROSS JOIN reference.ledger AS r
    WHERE e.workspace_id IS NOT NULL
),
counted AS (
    SELECT
        workspace_id, activity_date, count(*) AS events, count(DISTINCT user_id) AS active_users,
        count(DISTINCT session_id) AS sessions, count(DISTINCT feature) AS features_used
    FROM used
    GROUP BY workspace_id, activity_date
),
owners AS (
    SELECT workspace_id, activity_date, account, customer_id, plan, price_id, billing_status
    FROM used
    WHERE customer_id IS NOT NULL
    QUALIFY row_number() OVER (PARTITION BY workspace_id, activity_date ORDER BY occurred_at DESC, event_id DESC) = 1
)
SELECT
    c.activity_date, c.workspace_id, o.account, o.customer_id, o.plan, o.price_id, o.billing_status, c.events, c.active_users,
    c.sessions, c.features_used, c.activity_date <= $complete_until AS complete
FROM counted AS c
LEFT JOIN owners AS o ON o.workspace_id = c.workspace_id AND o.activity_date = c.activity_date
