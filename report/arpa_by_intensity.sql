-- ARPA by how much the product was used, at the end of the last complete month.
SELECT
    currency, strftime(month, '%Y-%m') AS month, usage_intensity, CAST(sum(customers) AS BIGINT) AS customers,
    CAST(sum(mrr_minor) AS BIGINT) AS mrr_minor,
    CAST((2 * sum(mrr_minor) + sum(customers)) // (2 * sum(customers)) AS BIGINT) AS arpa_minor
FROM marts.arpa_by_cohort
WHERE complete
GROUP BY currency, month, usage_intensity
QUALIFY month = max(month) OVER (PARTITION BY currency)
ORDER BY currency, CASE usage_intensity WHEN 'none' THEN 0 WHEN 'light' THEN 1 WHEN 'regular' THEN 2 ELSE 3 END
