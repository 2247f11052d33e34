-- Product events by outcome of their attribution, and the share that found a plan, by week (from Monday) of the event.
SELECT
    CAST(date_trunc('week', timezone(r.time_zone, e.occurred_at)) AS DATE) AS week, count(*) AS events,
    count(*) FILTER (WHERE e.attribution = 'resolved') AS resolved,
    count(*) FILTER (WHERE e.attribution = 'no_subscription') AS no_subscription,
    count(*) FILTER (WHERE e.attribution = 'unmapped_workspace') AS unmapped_workspace,
    count(*) FILTER (WHERE e.attribution = 'ambiguous') AS ambiguous,
    CAST(count(*) FILTER (WHERE e.attribution = 'resolved') AS DOUBLE) / count(*) AS resolved_share
FROM product.events AS e
CROSS JOIN reference.ledger AS r
GROUP BY CAST(date_trunc('week', timezone(r.time_zone, e.occurred_at)) AS DATE)
ORDER BY week
