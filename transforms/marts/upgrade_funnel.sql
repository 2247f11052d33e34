-- marts.upgrade_funnel: which features go before an upgrade, over all days whose outcome is known. Lift compares with all customer-days
-- of the plan, the odds ratio with those without the feature.
WITH summed AS (
    SELECT
        plan, feature, CAST(sum(exposed_customers) AS BIGINT) AS exposed, CAST(sum(upgraded_customers) AS BIGINT) AS upgraded,
        min(exposure_date) AS first_date, max(exposure_date) AS last_date
    FROM marts.upgrade_exposures
    WHERE complete
    GROUP BY plan, feature
),
compared AS (
    SELECT
        s.plan, s.feature, s.exposed, s.upgraded, s.first_date, s.last_date,
        CAST(s.upgraded AS DOUBLE) / s.exposed AS upgrade_rate, CAST(b.upgraded AS DOUBLE) / b.exposed AS baseline_rate,
        s.exposed - s.upgraded AS stayed, b.upgraded - s.upgraded AS upgraded_without,
        b.exposed - b.upgraded - (s.exposed - s.upgraded) AS stayed_without, s.exposed >= f.minimum_support AS supported
    FROM summed AS s
    JOIN summed AS b ON b.plan = s.plan AND b.feature = '(any)'
    CROSS JOIN reference.funnel AS f
    WHERE s.feature <> '(any)'
)
SELECT
    plan, feature, exposed AS exposed_customer_days, upgraded AS upgraded_customer_days, upgrade_rate, baseline_rate,
    CASE WHEN supported THEN upgrade_rate / nullif(baseline_rate, 0) END AS lift,
    CASE WHEN supported THEN CAST(upgraded AS DOUBLE) * stayed_without / nullif(CAST(stayed AS DOUBLE) * upgraded_without, 0) END
        AS odds_ratio,
    supported, first_date, last_date
FROM compared
