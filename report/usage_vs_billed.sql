-- What was used of what is billed by use, against what was billed, by month.
SELECT
    metric || ' in ' || coalesce(upper(currency), 'an unknown currency') AS what, currency, metric, strftime(month, '%Y-%m') AS month,
    CAST(sum(used_quantity) AS BIGINT) AS used, CAST(sum(billed_quantity) AS BIGINT) AS billed,
    CAST(sum(greatest(unbilled_quantity, 0)) AS BIGINT) AS unbilled, CAST(sum(billed_minor) AS BIGINT) AS billed_minor,
    CAST(sum(leakage_minor) AS BIGINT) AS leakage_minor, count(*) FILTER (WHERE leakage_minor IS NULL) AS without_price,
    bool_and(complete) AS complete
FROM marts.usage_vs_billed
GROUP BY currency, metric, month
ORDER BY metric, currency NULLS LAST, month
