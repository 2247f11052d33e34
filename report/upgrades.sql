-- The upgrade funnel: features in the order of their lift, for each plan on which anybody upgraded.
SELECT
    plan, feature, lift, odds_ratio, upgrade_rate, baseline_rate, exposed_customer_days, upgraded_customer_days,
    strftime(first_date, '%Y-%m-%d') AS first_date, strftime(last_date, '%Y-%m-%d') AS last_date
FROM marts.upgrade_funnel
WHERE baseline_rate > 0
ORDER BY plan DESC, lift DESC NULLS LAST, feature
