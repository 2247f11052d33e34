-- marts.upgrade_funnel: which features go before an upgrade. A customer-day is exposed to a feature at its first use that
-- day; it is upgraded if a higher plan than the last one in use began within the 7 days after that use (a trial of it counts,
-- a subscription that was never paid does not). Days whose 7 days are not over are left out.
WITH upgrades AS (
    SELECT account, customer_id, valid_from AS upgraded_at
    FROM billing.plan_timeline
    WHERE billing_status IN ('active', 'trialing', 'past_due') AND plan_rank IS NOT NULL
    QUALIFY plan_rank > lag(plan_rank) OVER (PARTITION BY account, customer_id ORDER BY valid_from)
),
complete AS (
    SELECT max(occurred_at) - INTERVAL 7 DAY AS until FROM product.events
),
used AS (
    SELECT
        e.account, e.customer_id, e.plan, e.feature, CAST(e.occurred_at AS DATE) AS used_on, min(e.occurred_at) AS first_used_at
    FROM product.events AS e
    JOIN complete AS c ON e.occurred_at <= c.until
    WHERE e.attribution = 'resolved' AND e.billing_status IN ('active', 'trialing') AND e.feature IS NOT NULL
        AND e.plan IS NOT NULL
    GROUP BY ALL
),
any_use AS (
    SELECT account, customer_id, plan, used_on, min(first_used_at) AS first_used_at
    FROM used
    GROUP BY account, customer_id, plan, used_on
),
exposed AS (
    SELECT
        u.plan, u.feature,
        EXISTS (
            SELECT 1 FROM upgrades AS g
            WHERE g.account = u.account AND g.customer_id = u.customer_id
                AND g.upgraded_at > u.first_used_at AND g.upgraded_at <= u.first_used_at + INTERVAL 7 DAY
        ) AS upgraded
    FROM used AS u
),
baseline AS (
    SELECT
        a.plan,
        avg(CASE WHEN EXISTS (
            SELECT 1 FROM upgrades AS g
            WHERE g.account = a.account AND g.customer_id = a.customer_id
                AND g.upgraded_at > a.first_used_at AND g.upgraded_at <= a.first_used_at + INTERVAL 7 DAY
        ) THEN 1.0 ELSE 0.0 END) AS baseline_rate
    FROM any_use AS a
    GROUP BY a.plan
)
SELECT
    x.plan, x.feature,
    count(*) AS exposed_customer_days,
    count(*) FILTER (WHERE x.upgraded) AS upgraded_customer_days,
    avg(CASE WHEN x.upgraded THEN 1.0 ELSE 0.0 END) AS upgrade_rate,
    b.baseline_rate,
    avg(CASE WHEN x.upgraded THEN 1.0 ELSE 0.0 END) / nullif(b.baseline_rate, 0) AS lift
FROM exposed AS x
JOIN baseline AS b ON b.plan = x.plan
GROUP BY x.plan, x.feature, b.baseline_rate
