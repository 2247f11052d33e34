-- Which paid features are used without paying, over all days.
SELECT
    currency, feature, feature_plan, count(DISTINCT customer_id) AS customers, CAST(sum(events) AS BIGINT) AS events,
    CAST(sum(leakage_minor) AS BIGINT) AS leakage_minor
FROM marts.delinquent_feature_usage
GROUP BY currency, feature, feature_plan
ORDER BY currency NULLS LAST, leakage_minor DESC NULLS LAST, feature
