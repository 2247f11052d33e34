-- Attribution of the events of audit.sample, each looked up by itself. Of a row of the CRM holds what was written last among its
-- versions that had taken effect by then.
WITH said AS (
    SELECT
        i.anonymous_id, i.user_id, i.occurred_at,
        row_number() OVER (PARTITION BY i.anonymous_id ORDER BY i.occurred_at, i.received_at) AS nth
    FROM product.identifications AS i
    WHERE i.anonymous_id IN (SELECT anonymous_id FROM audit.sample)
),
-- the device's user: by its last identify event, else by its first one, if that is not too far ahead
by_device AS (
    SELECT e.event_id, e.occurred_at, s.user_id
    FROM audit.sample AS e
    CROSS JOIN reference.identity AS r
    JOIN said AS s
        ON s.anonymous_id = e.anonymous_id
        AND (s.occurred_at <= e.occurred_at OR (s.nth = 1 AND s.occurred_at <= e.occurred_at + INTERVAL 1 DAY * r.lookback_days))
    WHERE e.workspace_id IS NULL AND e.user_id IS NULL
    -- of two statements of one moment the one received first counts
    QUALIFY row_number() OVER (
        PARTITION BY e.event_id, e.occurred_at
        ORDER BY s.occurred_at <= e.occurred_at DESC, s.occurred_at DESC, s.nth
    ) = 1
),
events AS (
    SELECT
        e.event_id, e.occurred_at, e.workspace_id, d.user_id AS identified_user_id, coalesce(e.user_id, d.user_id) AS user_id,
        CASE WHEN e.workspace_id IS NOT NULL THEN 'sent' WHEN e.user_id IS NOT NULL THEN 'membership' ELSE 'identity' END AS way
    FROM audit.sample AS e
    LEFT JOIN by_device AS d ON d.event_id = e.event_id AND d.occurred_at = e.occurred_at
),
memberships AS (
    SELECT e.event_id, e.occurred_at, m.workspace_id, m.deleted
    FROM events AS e
    JOIN raw.crm_memberships AS m ON m.user_id = e.user_id AND m.effective_at <= e.occurred_at
    WHERE e.workspace_id IS NULL
    QUALIFY row_number() OVER (
        PARTITION BY e.event_id, e.occurred_at, m.workspace_id ORDER BY m.updated_at DESC, m."offset" DESC
    ) = 1
),
places AS (
    SELECT event_id, occurred_at, count(*) AS workspaces, min(workspace_id) AS workspace_id
    FROM memberships
    WHERE NOT deleted
    GROUP BY event_id, occurred_at
),
placed AS (
    SELECT
        e.event_id, e.occurred_at, e.identified_user_id, e.way, coalesce(p.workspaces, 1) AS workspaces,
        CASE WHEN e.workspace_id IS NOT NULL THEN e.workspace_id WHEN p.workspaces = 1 THEN p.workspace_id END AS workspace_id
    FROM events AS e
    LEFT JOIN places AS p ON p.event_id = e.event_id AND p.occurred_at = e.occurred_at
),
mappings AS (
    SELECT e.event_id, e.occurred_at, w.customer_id, w.deleted
    FROM placed AS e
    JOIN raw.crm_workspaces AS w ON w.workspace_id = e.workspace_id AND w.effective_at <= e.occurred_at
    QUALIFY row_number() OVER (
        PARTITION BY e.event_id, e.occurred_at, coalesce(w.mapping_id, '') ORDER BY w.updated_at DESC, w."offset" DESC
    ) = 1
),
owners AS (
    SELECT event_id, occurred_at, count(DISTINCT customer_id) AS customers, min(customer_id) AS customer_id
    FROM mappings
    WHERE NOT deleted AND customer_id IS NOT NULL
    GROUP BY event_id, occurred_at
),
owned AS (
    SELECT
        e.event_id, e.occurred_at, e.identified_user_id, e.workspace_id, e.way,
        e.workspaces > 1 OR coalesce(o.customers, 1) > 1 AS several, CASE WHEN o.customers = 1 THEN o.customer_id END AS customer_id
    FROM placed AS e
    LEFT JOIN owners AS o ON o.event_id = e.event_id AND o.occurred_at = e.occurred_at
)
SELECT
    e.event_id, e.occurred_at,
    CASE
        WHEN e.several THEN 'ambiguous'
        WHEN e.customer_id IS NULL THEN 'unmapped_workspace'
        WHEN t.customer_id IS NULL THEN 'no_subscription'
        ELSE 'resolved'
    END AS attribution,
    e.identified_user_id, e.workspace_id AS attributed_workspace_id, CASE WHEN e.workspace_id IS NOT NULL THEN e.way END AS workspace_source,
    CASE WHEN e.customer_id IS NOT NULL THEN 'platform' END AS account, e.customer_id, t.subscription_id, t.plan, t.plan_rank,
    t.price_id, t.billing_status
FROM owned AS e
LEFT JOIN billing.plan_timeline AS t
    ON t.account = 'platform' AND t.customer_id = e.customer_id AND t.valid_from <= e.occurred_at
    AND (t.valid_to IS NULL OR t.valid_to > e.occurred_at)
