-- marts.usage_vs_billed: what was used of what is billed by use, against what invoices billed for the same month.
WITH measured AS (
    SELECT
        e.account, e.customer_id, m.metric, m.per_unit, e.price_id, e.occurred_at, e.event_id,
        CAST(date_trunc('month', timezone(r.time_zone, e.occurred_at)) AS DATE) AS month,
        TRY_CAST(e.properties ->> m.property AS BIGINT) AS amount  -- what is no whole number counts nothing
    FROM product.events AS e
    JOIN reference.metered AS m ON m.event_name = e.event_name
    CROSS JOIN reference.ledger AS r
    WHERE e.customer_id IS NOT NULL
),
last_price AS (
    SELECT account, customer_id, metric, month, price_id
    FROM measured
    QUALIFY row_number() OVER (PARTITION BY account, customer_id, metric, month ORDER BY occurred_at DESC, event_id DESC) = 1
),
used AS (
    SELECT
        account, customer_id, metric, month, count(*) AS events,
        CAST(coalesce(sum(amount) FILTER (WHERE amount > 0), 0) // min(per_unit) AS BIGINT) AS used_quantity
    FROM measured
    GROUP BY account, customer_id, metric, month
),
billed AS (
    SELECT
        l.account, i.customer_id, m.metric, CAST(date_trunc('month', timezone(r.time_zone, l.period_start)) AS DATE) AS month,
        CAST(sum(l.quantity) AS BIGINT) AS billed_quantity, CAST(sum(l.amount_minor) AS BIGINT) AS billed_minor,
        max(l.currency) AS currency
    FROM billing.invoice_line_items AS l
    JOIN billing.invoices AS i ON i.account = l.account AND i.invoice_id = l.invoice_id
    JOIN reference.metered AS m ON m.product_id = l.product_id
    CROSS JOIN reference.ledger AS r
    WHERE i.status IN ('open', 'paid', 'uncollectible') AND i.customer_id IS NOT NULL AND l.period_start IS NOT NULL
    GROUP BY l.account, i.customer_id, m.metric, CAST(date_trunc('month', timezone(r.time_zone, l.period_start)) AS DATE)
),
compared AS (
    SELECT
        coalesce(u.account, b.account) AS account, coalesce(u.customer_id, b.customer_id) AS customer_id,
        coalesce(u.metric, b.metric) AS metric, coalesce(u.month, b.month) AS month, coalesce(u.events, 0) AS events,
        coalesce(u.used_quantity, 0) AS used_quantity, coalesce(b.billed_quantity, 0) AS billed_quantity,
        coalesce(b.billed_minor, 0) AS billed_minor, b.currency
    FROM used AS u
    FULL JOIN billed AS b
        ON b.account = u.account AND b.customer_id = u.customer_id AND b.metric = u.metric AND b.month = u.month
),
with_currency AS (
    SELECT
        c.account, c.customer_id, c.metric, c.month, c.events, c.used_quantity, c.billed_quantity, c.billed_minor,
        coalesce(c.currency, p.currency) AS currency
    FROM compared AS c
    LEFT JOIN last_price AS l
        ON l.account = c.account AND l.customer_id = c.customer_id AND l.metric = c.metric AND l.month = c.month
    LEFT JOIN billing.prices AS p ON p.account = l.account AND p.price_id = l.price_id
),
rates AS (
    SELECT p.account, m.metric, p.currency, coalesce(p.unit_amount_decimal, CAST(p.unit_amount_minor AS VARCHAR)) AS unit_amount_decimal
    FROM billing.prices AS p
    JOIN reference.metered AS m ON m.product_id = p.product_id
    WHERE coalesce(p.unit_amount_decimal, CAST(p.unit_amount_minor AS VARCHAR)) IS NOT NULL
    QUALIFY row_number() OVER (
        PARTITION BY p.account, m.metric, p.currency ORDER BY p.active DESC NULLS LAST, p.created_at DESC NULLS LAST, p.price_id
    ) = 1
)
SELECT
    c.account, c.customer_id, c.metric, c.month, c.events, c.used_quantity, c.billed_quantity,
    c.used_quantity - c.billed_quantity AS unbilled_quantity, c.currency, r.unit_amount_decimal, c.billed_minor,
    CAST(round(greatest(c.used_quantity - c.billed_quantity, 0) * TRY_CAST(r.unit_amount_decimal AS DECIMAL(18, 12))) AS BIGINT)
        AS leakage_minor,
    c.month + INTERVAL 1 MONTH <= $complete_until + INTERVAL 1 DAY AS complete
FROM with_currency AS c
LEFT JOIN rates AS r ON r.account = c.account AND r.metric = c.metric AND r.currency = c.currency
