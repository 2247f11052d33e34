-- billing.object_links: which objects belong to which, as any version tells, each link at both of its ends.
WITH told AS (
    SELECT DISTINCT
        account, object_id,
        CASE object_type
            WHEN 'subscription' THEN customer_id
            WHEN 'refund' THEN state ->> '$.charge_id'
            WHEN 'dispute' THEN state ->> '$.charge_id'
            WHEN 'credit_note' THEN state ->> '$.invoice_id'
            WHEN 'balance_transaction' THEN state ->> '$.source_id'
        END AS parent_id
    FROM billing.event_versions
    WHERE livemode
)
SELECT account, object_id, 'parent' AS relation, parent_id AS linked_id FROM told WHERE parent_id IS NOT NULL
UNION ALL
SELECT account, parent_id AS object_id, 'child' AS relation, object_id AS linked_id FROM told WHERE parent_id IS NOT NULL
