-- marts.upgrade_exposures: who used which feature on which day, and who then moved to a higher plan. A customer is exposed to a feature
-- at its first use that day; it is upgraded if a higher plan than the last one in use began within the window after that use (a
-- trial of it counts, a subscription that was never paid does not).
WITH upgrades AS (
    SELECT account, customer_id, valid_from AS upgraded_at
    FROM billing.plan_timeline
    WHERE billing_status IN ('active', 'trialing', 'past_due') AND plan_rank IS NOT NULL
    QUALIFY plan_rank > lag(plan_rank) OVER (PARTITION BY account, customer_id ORDER BY valid_from)
),
used AS (
    SELECT
        e.account, e.customer_id, e.plan, e.feature, CAST(timezone(r.time_zone, e.occurred_at) AS DATE) AS exposure_date,
        min(e.occurred_at) AS first_used_at
    FROM product.events AS e
    CROSS JOIN reference.ledger AS r
    WHERE e.attribution = 'resolved' AND e.billing_status IN ('active', 'trialing') AND e.feature IS NOT NULL
        AND e.plan IS NOT NULL
    GROUP BY e.account, e.customer_id, e.plan, e.feature, CAST(timezone(r.time_zone, e.occurred_at) AS DATE)
),
exposed AS (
    SELECT account, customer_id, plan, feature, exposure_date, first_used_at FROM used
    UNION ALL
    SELECT account, customer_id, plan, '(any)' AS feature, exposure_date, min(first_used_at) AS first_used_at
    FROM used
    GROUP BY account, customer_id, plan, exposure_date
)
SELECT
    x.plan, x.feature, x.exposure_date, count(*) AS exposed_customers,
    count(*) FILTER (WHERE EXISTS (
        SELECT 1 FROM upgrades AS g
        WHERE g.account = x.account AND g.customer_id = x.customer_id
            AND g.upgraded_at > x.first_used_at AND g.upgraded_at <= x.first_used_at + INTERVAL 1 DAY * f.window_days
    )) AS upgraded_customers,
    x.exposure_date <= $complete_until AS complete
FROM exposed AS x
CROSS JOIN reference.funnel AS f
GROUP BY x.plan, x.feature, x.exposure_date
