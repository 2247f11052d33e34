-- What should stand in the revenue ledger, given the facts known: a function of the set of events, at each step of knowledge.
--
-- Input `known`: one row an event about an object that money depends on and a step at which it is known (account, grp, step,
-- object_type, object_id, event_id, event_type, created_at, and the columns of revenue_ledger.FACTS). A fact that was once
-- true stays true (finalized, captured, failed, withdrawn), so nothing here depends on which of two events came last, save
-- the running total of refunds of a charge whose refunds are not itemised.
-- Output: one row a posting and step; amounts signed, in minor units of `currency`.
WITH charge_events AS (
    SELECT
        account, grp, step, object_id AS charge_id, event_id, event_type, created_at, made_at, amount_refunded_minor,
        -- what is authorised but not captured, and what has not succeeded (yet), is no money; the rest that a partial
        -- capture releases shows as refunded and never was money either
        CASE WHEN status = 'succeeded' THEN coalesce(amount_captured_minor, CASE WHEN captured THEN amount_minor ELSE 0 END) ELSE 0 END
            AS captured_minor,
        amount_minor
    FROM known
    WHERE object_type = 'charge'
),
charges AS (
    SELECT account, grp, step, object_id AS charge_id, max(customer_id) AS customer_id, max(currency) AS currency
    FROM known
    WHERE object_type = 'charge'
    GROUP BY account, grp, step, object_id
),
-- Each capture of a charge raises the amount captured to a new level; it happened when the first event says so, or, if that
-- event is not known and nothing says that it was less before, when the charge was made.
levels AS (
    SELECT
        account, grp, step, charge_id, captured_minor AS level_minor,
        arg_min(
            CASE
                WHEN event_type IN ('charge.succeeded', 'charge.captured') OR less_before THEN created_at
                ELSE coalesce(made_at, created_at)
            END,
            (created_at, event_type NOT IN ('charge.succeeded', 'charge.captured'), event_id)
        ) AS booked_at
    FROM (
        SELECT
            account, grp, step, charge_id, captured_minor, event_id, event_type, created_at, made_at,
            min(captured_minor) OVER (PARTITION BY account, grp, step, charge_id) < captured_minor AS less_before
        FROM charge_events
    )
    WHERE captured_minor > 0
    GROUP BY account, grp, step, charge_id, captured_minor
),
captures AS (
    SELECT
        account, grp, step, charge_id, level_minor, booked_at,
        level_minor - lag(level_minor, 1, 0) OVER (PARTITION BY account, grp, step, charge_id ORDER BY level_minor) AS amount_minor
    FROM levels
),
dated_charges AS (
    SELECT account, grp, step, charge_id, min(booked_at) AS effective_at
    FROM levels
    GROUP BY account, grp, step, charge_id
),
-- A refund is told by its own events, and until 2022-11-15 in the list that its charge carried; by its id it counts once.
refunds AS (
    SELECT
        account, grp, step, object_id AS refund_id, max(charge_id) AS charge_id, max(amount_minor) AS amount_minor,
        max(currency) AS currency, coalesce(min(made_at), min(created_at)) AS booked_at,
        min(created_at) FILTER (WHERE status = 'failed') AS failed_at,
        min(created_at) FILTER (WHERE status = 'canceled') AS canceled_at,
        -- the release of what was authorised and not captured is called a refund, and moves nothing
        coalesce(bool_or(reason IN ('partial_capture', 'expired_uncaptured_charge')), false) AS is_release
    FROM known
    WHERE object_type = 'refund'
    GROUP BY account, grp, step, object_id
),
-- What a charge says was refunded beyond the refunds known one by one: before 2024-10-28 no refund event was sent for most.
-- Event by event, so that each part has its day; when the refund itself becomes known, its part here vanishes.
unitemised AS (
    SELECT
        account, grp, step, charge_id, event_id, created_at,
        excess_minor - lag(excess_minor, 1, 0) OVER (
            PARTITION BY account, grp, step, charge_id ORDER BY created_at, amount_refunded_minor, event_id
        ) AS amount_minor
    FROM (
        SELECT
            e.account, e.grp, e.step, e.charge_id, e.event_id, e.created_at, e.amount_refunded_minor,
            least(
                e.captured_minor,
                greatest(0, e.amount_refunded_minor - (e.amount_minor - e.captured_minor) - coalesce(sum(r.amount_minor), 0))
            ) AS excess_minor
        FROM charge_events AS e
        LEFT JOIN refunds AS r
            ON r.account = e.account AND r.grp = e.grp AND r.step = e.step AND r.charge_id = e.charge_id AND NOT r.is_release
            -- each side of a condition names one table: else DuckDB compares every event with every refund
            AND r.booked_at <= e.created_at AND coalesce(least(r.failed_at, r.canceled_at), TIMESTAMPTZ 'infinity') > e.created_at
        WHERE e.amount_refunded_minor IS NOT NULL
        GROUP BY e.account, e.grp, e.step, e.charge_id, e.event_id, e.created_at, e.amount_refunded_minor, e.amount_minor,
            e.captured_minor
    )
),
disputes AS (
    SELECT
        account, grp, step, object_id AS dispute_id, max(charge_id) AS charge_id, max(amount_minor) AS amount_minor,
        max(currency) AS currency,
        min(created_at) FILTER (WHERE event_type = 'charge.dispute.funds_withdrawn') AS withdrawn_at,
        min(created_at) FILTER (WHERE event_type = 'charge.dispute.funds_reinstated') AS reinstated_at
    FROM known
    WHERE object_type = 'dispute'
    GROUP BY account, grp, step, object_id
),
-- Balance transactions come inside disputes, and from the API, alone or inside charges and refunds; by their id they count once.
transactions AS (
    SELECT
        t.account, t.grp, t.step, t.object_id AS transaction_id, max(t.source_id) AS source_id,
        max(t.amount_minor) AS amount_minor, max(t.fee_minor) AS fee_minor, max(t.currency) AS currency,
        coalesce(min(t.made_at), min(t.created_at)) AS booked_at,
        bool_or(coalesce(t.reporting_category IN ('dispute', 'dispute_reversal'), false) OR d.dispute_id IS NOT NULL) AS of_dispute
    FROM known AS t
    LEFT JOIN disputes AS d ON d.account = t.account AND d.grp = t.grp AND d.step = t.step AND d.dispute_id = t.source_id
    WHERE t.object_type = 'balance_transaction'
    GROUP BY t.account, t.grp, t.step, t.object_id
),
-- The charge that a balance transaction goes back to, through the refund or dispute if need be.
sources AS (
    SELECT account, grp, step, charge_id AS source_id, charge_id, 'charge' AS object_type FROM charges
    UNION ALL
    SELECT account, grp, step, refund_id, charge_id, 'refund' FROM refunds
    UNION ALL
    SELECT account, grp, step, dispute_id, charge_id, 'dispute' FROM disputes
),
invoices AS (
    SELECT
        account, grp, step, object_id AS invoice_id, max(customer_id) AS customer_id, max(currency) AS currency,
        arg_min(total_minor, (created_at, event_id)) AS total_minor,
        arg_min(coalesce(total_excluding_tax_minor, total_minor - coalesce(tax_minor, 0)), (created_at, event_id)) AS net_minor,
        coalesce(min(finalized_at), min(created_at)) AS finalized_at,
        -- before the transitions carried their times, the event's own time says it
        coalesce(min(marked_uncollectible_at), min(created_at) FILTER (WHERE status = 'uncollectible')) AS uncollectible_at,
        coalesce(min(voided_at), min(created_at) FILTER (WHERE status = 'void')) AS voided_at,
        coalesce(min(paid_at), min(created_at) FILTER (WHERE status = 'paid')) AS paid_at,
        arg_min(amount_remaining_minor, (created_at, event_id)) FILTER (WHERE status = 'uncollectible') AS remaining_minor
    FROM known
    WHERE object_type = 'invoice' AND status <> 'draft'
    GROUP BY account, grp, step, object_id
),
-- Of a write-off, the part that is not tax: pro rata, rounded half up.
written_off AS (
    SELECT
        account, grp, step, invoice_id, customer_id, currency, total_minor, net_minor, finalized_at, uncollectible_at, voided_at,
        paid_at,
        CASE WHEN uncollectible_at IS NOT NULL THEN coalesce(remaining_minor, total_minor) ELSE 0 END AS off_minor,
        CASE
            WHEN uncollectible_at IS NULL OR total_minor = 0 THEN 0
            ELSE (2 * coalesce(remaining_minor, total_minor) * net_minor + total_minor) // (2 * total_minor)
        END AS off_net_minor
    FROM invoices
),
credit_notes AS (
    SELECT
        account, grp, step, object_id AS note_id, max(invoice_id) AS invoice_id, max(customer_id) AS customer_id,
        max(currency) AS currency, max(coalesce(total_minor, amount_minor)) AS total_minor,
        max(coalesce(total_excluding_tax_minor, total_minor, amount_minor)) AS net_minor,
        coalesce(min(made_at), min(created_at)) AS booked_at,
        coalesce(min(voided_at), min(created_at) FILTER (WHERE status = 'void')) AS voided_at
    FROM known
    WHERE object_type = 'credit_note'
    GROUP BY account, grp, step, object_id
),
credited AS (
    SELECT account, grp, step, invoice_id, sum(total_minor) AS total_minor, sum(net_minor) AS net_minor
    FROM credit_notes
    WHERE voided_at IS NULL
    GROUP BY account, grp, step, invoice_id
),
cash AS (
    SELECT
        c.account, c.grp, c.step, 'charge' AS entry_type, c.charge_id AS origin_id, 'charge' AS object_type,
        c.charge_id AS object_id, CAST(c.level_minor AS VARCHAR) AS part, c.currency, c.amount_minor, c.booked_at,
        c.booked_at AS effective_at
    FROM (SELECT l.*, g.currency FROM captures AS l JOIN charges AS g USING (account, grp, step, charge_id)) AS c
    UNION ALL
    -- A charge of which nothing is captured (yet) gives nothing back: what looks like its refund releases the hold.
    SELECT
        r.account, r.grp, r.step, m.entry_type, r.charge_id, 'refund', r.refund_id, '', r.currency, m.sign * r.amount_minor,
        m.booked_at, d.effective_at
    FROM refunds AS r
    CROSS JOIN LATERAL (
        SELECT unnest(['refund', 'refund_failed', 'refund_canceled']) AS entry_type, unnest([-1, 1, 1]) AS sign,
            unnest([r.booked_at, r.failed_at, CASE WHEN r.failed_at IS NULL THEN r.canceled_at END]) AS booked_at
    ) AS m
    LEFT JOIN dated_charges AS d ON d.account = r.account AND d.grp = r.grp AND d.step = r.step AND d.charge_id = r.charge_id
    LEFT JOIN charges AS c ON c.account = r.account AND c.grp = r.grp AND c.step = r.step AND c.charge_id = r.charge_id
    WHERE m.booked_at IS NOT NULL AND NOT r.is_release AND (c.charge_id IS NULL OR d.charge_id IS NOT NULL)
    UNION ALL
    SELECT
        u.account, u.grp, u.step, 'refund', u.charge_id, 'charge', u.charge_id, u.event_id, c.currency, -u.amount_minor,
        u.created_at, d.effective_at
    FROM unitemised AS u
    JOIN charges AS c USING (account, grp, step, charge_id)
    LEFT JOIN dated_charges AS d ON d.account = u.account AND d.grp = u.grp AND d.step = u.step AND d.charge_id = u.charge_id
    UNION ALL
    -- Stated in the charge's currency: where the account settles in another one, by the amount that is disputed.
    SELECT
        t.account, t.grp, t.step, CASE WHEN t.amount_minor < 0 THEN 'dispute_withdrawn' ELSE 'dispute_reinstated' END,
        p.charge_id, 'dispute', coalesce(t.source_id, t.transaction_id), t.transaction_id, coalesce(p.currency, t.currency),
        CASE WHEN p.currency IS NULL OR p.currency = t.currency THEN t.amount_minor ELSE sign(t.amount_minor) * p.amount_minor END,
        t.booked_at, d.effective_at
    FROM transactions AS t
    LEFT JOIN disputes AS p ON p.account = t.account AND p.grp = t.grp AND p.step = t.step AND p.dispute_id = t.source_id
    LEFT JOIN dated_charges AS d ON d.account = t.account AND d.grp = t.grp AND d.step = t.step AND d.charge_id = p.charge_id
    WHERE t.of_dispute
    UNION ALL
    -- Shapes that carry no balance transactions say it by the event alone.
    SELECT
        p.account, p.grp, p.step, m.entry_type, p.charge_id, 'dispute', p.dispute_id, 'event', p.currency,
        m.sign * p.amount_minor, m.booked_at, d.effective_at
    FROM disputes AS p
    CROSS JOIN LATERAL (
        SELECT unnest(['dispute_withdrawn', 'dispute_reinstated']) AS entry_type, unnest([-1, 1]) AS sign,
            unnest([p.withdrawn_at, p.reinstated_at]) AS booked_at
    ) AS m
    LEFT JOIN dated_charges AS d ON d.account = p.account AND d.grp = p.grp AND d.step = p.step AND d.charge_id = p.charge_id
    ANTI JOIN (SELECT account, grp, step, source_id FROM transactions WHERE of_dispute) AS t
        ON t.account = p.account AND t.grp = p.grp AND t.step = p.step AND t.source_id = p.dispute_id
    WHERE m.booked_at IS NOT NULL
    UNION ALL
    SELECT
        t.account, t.grp, t.step, CASE WHEN t.of_dispute THEN 'dispute_fee' ELSE 'fee' END, s.charge_id,
        coalesce(s.object_type, 'balance_transaction'), coalesce(t.source_id, t.transaction_id), t.transaction_id, t.currency,
        -t.fee_minor, t.booked_at, d.effective_at
    FROM transactions AS t
    LEFT JOIN sources AS s ON s.account = t.account AND s.grp = t.grp AND s.step = t.step AND s.source_id = t.source_id
    LEFT JOIN dated_charges AS d ON d.account = t.account AND d.grp = t.grp AND d.step = t.step AND d.charge_id = s.charge_id
),
billed AS (
    SELECT
        i.account, i.grp, i.step, m.entry_type, i.invoice_id AS origin_id, 'invoice' AS object_type, i.invoice_id AS object_id,
        i.customer_id, i.currency, m.net_minor AS amount_minor, m.total_minor - m.net_minor AS tax_minor, m.booked_at,
        i.finalized_at AS effective_at
    FROM written_off AS i
    LEFT JOIN credited AS c ON c.account = i.account AND c.grp = i.grp AND c.step = i.step AND c.invoice_id = i.invoice_id
    CROSS JOIN LATERAL (
        SELECT
            unnest(['invoice', 'invoice_uncollectible', 'invoice_recovered', 'invoice_voided']) AS entry_type,
            unnest([
                i.net_minor, -i.off_net_minor, i.off_net_minor,
                -- a voided invoice is worth nothing, whatever was written off or credited before
                i.off_net_minor + coalesce(c.net_minor, 0) - i.net_minor
            ]) AS net_minor,
            unnest([
                i.total_minor, -i.off_minor, i.off_minor, i.off_minor + coalesce(c.total_minor, 0) - i.total_minor
            ]) AS total_minor,
            unnest([
                i.finalized_at, i.uncollectible_at, CASE WHEN i.paid_at >= i.uncollectible_at THEN i.paid_at END, i.voided_at
            ]) AS booked_at
    ) AS m
    WHERE m.booked_at IS NOT NULL
    UNION ALL
    SELECT
        n.account, n.grp, n.step, m.entry_type, n.invoice_id, 'credit_note', n.note_id, coalesce(i.customer_id, n.customer_id),
        coalesce(n.currency, i.currency), m.sign * n.net_minor, m.sign * (n.total_minor - n.net_minor), m.booked_at,
        i.finalized_at
    FROM credit_notes AS n
    LEFT JOIN invoices AS i ON i.account = n.account AND i.grp = n.grp AND i.step = n.step AND i.invoice_id = n.invoice_id
    CROSS JOIN LATERAL (
        SELECT unnest(['credit_note', 'credit_note_voided']) AS entry_type, unnest([-1, 1]) AS sign,
            unnest([n.booked_at, n.voided_at]) AS booked_at
    ) AS m
    WHERE m.booked_at IS NOT NULL
)
-- An amount whose currency nothing says (yet) is not posted: no sum could take it.
SELECT
    c.account, c.grp, c.step, 'cash' AS basis, c.entry_type, c.origin_id, c.object_type, c.object_id, c.part, g.customer_id,
    coalesce(c.currency, g.currency) AS currency, CAST(c.amount_minor AS BIGINT) AS amount_minor,
    CAST(NULL AS BIGINT) AS tax_minor, c.booked_at, c.effective_at
FROM cash AS c
LEFT JOIN charges AS g ON g.account = c.account AND g.grp = c.grp AND g.step = c.step AND g.charge_id = c.origin_id
WHERE c.amount_minor <> 0 AND coalesce(c.currency, g.currency) IS NOT NULL
UNION ALL
SELECT
    account, grp, step, 'billed', entry_type, origin_id, object_type, object_id, '', customer_id, currency,
    CAST(amount_minor AS BIGINT), CAST(tax_minor AS BIGINT), booked_at, effective_at
FROM billed
WHERE (amount_minor <> 0 OR tax_minor <> 0) AND currency IS NOT NULL
