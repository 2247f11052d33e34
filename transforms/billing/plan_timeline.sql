-- billing.plan_timeline: the plan in force for each customer at each moment, without gap or overlap.
-- Every start and end of a subscription's interval is a boundary; between two boundaries nothing changes, and one
-- subscription is in force: best status, higher plan, later start, greater id. Equal neighbours become one interval.
WITH intervals AS (
    SELECT
        h.account, h.customer_id, h.subscription_id, h.plan, h.plan_rank, h.price_id, h.billing_status, h.quantity, h.currency,
        h.valid_from, h.valid_to, s.preference,
        min(h.valid_from) OVER (PARTITION BY h.account, h.subscription_id) AS began_at,
        CASE
            WHEN list_contains(r.counted_statuses, h.status) AND (r.count_paused_collection OR NOT h.collection_paused) THEN h.monthly_minor
            ELSE 0
        END AS mrr_minor
    FROM billing.subscription_history AS h
    JOIN reference.statuses AS s ON s.status = h.status
    CROSS JOIN reference.mrr AS r
),
boundaries AS (
    SELECT account, customer_id, valid_from AS boundary FROM intervals
    UNION
    SELECT account, customer_id, valid_to AS boundary FROM intervals WHERE valid_to IS NOT NULL
),
in_force AS (
    SELECT
        b.boundary, i.account, i.customer_id, i.subscription_id, i.plan, i.plan_rank, i.price_id, i.billing_status, i.quantity,
        i.currency, i.mrr_minor
    FROM boundaries AS b
    JOIN intervals AS i
        ON i.account = b.account AND i.customer_id = b.customer_id
        AND i.valid_from <= b.boundary AND (i.valid_to IS NULL OR i.valid_to > b.boundary)
    QUALIFY row_number() OVER (
        PARTITION BY b.account, b.customer_id, b.boundary
        ORDER BY i.preference, coalesce(i.plan_rank, 0) DESC, i.began_at DESC, i.subscription_id DESC
    ) = 1
),
marked AS (
    SELECT
        boundary, account, customer_id, subscription_id, plan, plan_rank, price_id, billing_status, quantity, currency, mrr_minor,
        lag(boundary) OVER w IS NULL
        OR lag(subscription_id) OVER w IS DISTINCT FROM subscription_id
        OR lag(plan) OVER w IS DISTINCT FROM plan
        OR lag(price_id) OVER w IS DISTINCT FROM price_id
        OR lag(billing_status) OVER w IS DISTINCT FROM billing_status
        OR lag(quantity) OVER w IS DISTINCT FROM quantity
        OR lag(currency) OVER w IS DISTINCT FROM currency
        OR lag(mrr_minor) OVER w IS DISTINCT FROM mrr_minor AS begins
    FROM in_force
    WINDOW w AS (PARTITION BY account, customer_id ORDER BY boundary)
)
SELECT
    account, customer_id, subscription_id, plan, plan_rank, price_id, billing_status, quantity, currency, mrr_minor,
    boundary AS valid_from,
    lead(boundary) OVER (PARTITION BY account, customer_id ORDER BY boundary) AS valid_to
FROM marked
WHERE begins
