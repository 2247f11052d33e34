-- MRR movements of each month over all plans, and the MRR that they leave; a month in which nothing moved is there too.
WITH moved AS (
    SELECT
        currency, month, sum(new_minor) AS new_minor, sum(expansion_minor) AS expansion_minor,
        sum(reactivation_minor) AS reactivation_minor, sum(contraction_minor) AS contraction_minor, sum(churn_minor) AS churn_minor,
        sum(change_minor) AS change_minor
    FROM marts.mrr_movements
    GROUP BY currency, month
),
months AS (
    SELECT currency, month, complete FROM marts.mrr_movements
    UNION
    SELECT currency, month, complete FROM marts.arpa_by_cohort
),
known AS (
    SELECT currency, month, bool_and(complete) AS complete FROM months GROUP BY currency, month
)
SELECT
    k.currency, strftime(k.month, '%Y-%m') AS month, CAST(coalesce(m.new_minor, 0) AS BIGINT) AS new_minor,
    CAST(coalesce(m.expansion_minor, 0) AS BIGINT) AS expansion_minor,
    CAST(coalesce(m.reactivation_minor, 0) AS BIGINT) AS reactivation_minor,
    CAST(coalesce(m.contraction_minor, 0) AS BIGINT) AS contraction_minor, CAST(coalesce(m.churn_minor, 0) AS BIGINT) AS churn_minor,
    CAST(coalesce(m.change_minor, 0) AS BIGINT) AS change_minor,
    CAST(coalesce(sum(m.change_minor) OVER (PARTITION BY k.currency ORDER BY k.month), 0) AS BIGINT) AS mrr_minor, k.complete
FROM known AS k
LEFT JOIN moved AS m ON m.currency = k.currency AND m.month = k.month
ORDER BY k.currency, k.month
