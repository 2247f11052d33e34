-- ARPA of each cohort at the end of each month, over all intensities of use; rounded half up from the sums, never an average of averages.
SELECT
    currency, strftime(cohort_month, '%Y-%m') AS cohort, strftime(month, '%Y-%m') AS month,
    CAST(sum(customers) AS BIGINT) AS customers, CAST(sum(mrr_minor) AS BIGINT) AS mrr_minor,
    CAST((2 * sum(mrr_minor) + sum(customers)) // (2 * sum(customers)) AS BIGINT) AS arpa_minor, bool_and(complete) AS complete
FROM marts.arpa_by_cohort
GROUP BY currency, cohort_month, month
ORDER BY currency, cohort, month
