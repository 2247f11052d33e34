-- Use of paid features without paying: leakage of each month and status.
SELECT
    currency, strftime(date_trunc('month', usage_date), '%Y-%m') AS month, billing_status, count(DISTINCT customer_id) AS customers,
    CAST(sum(events) AS BIGINT) AS events, CAST(sum(leakage_minor) AS BIGINT) AS leakage_minor, bool_and(complete) AS complete
FROM marts.delinquent_feature_usage
GROUP BY currency, date_trunc('month', usage_date), billing_status
ORDER BY currency NULLS LAST, month, billing_status
