-- product.unknown_fields: which fields events carry that no column is declared for. A client can send any name, so only the most
-- frequent of a day are told by name.
WITH named AS (
    SELECT CAST(timezone('UTC', occurred_at) AS DATE) AS event_date, unnest(list_distinct(json_keys(extra))) AS field
    FROM product.events
    WHERE extra IS NOT NULL
),
counted AS (
    SELECT event_date, left(field, 100) AS field, count(*) AS events
    FROM named
    GROUP BY event_date, left(field, 100)
),
ranked AS (
    SELECT event_date, field, events, row_number() OVER (PARTITION BY event_date ORDER BY events DESC, field) AS place
    FROM counted
)
SELECT
    event_date, CASE WHEN place <= 50 THEN field ELSE '(other)' END AS field, CAST(sum(events) AS BIGINT) AS events,
    count(*) AS fields
FROM ranked
GROUP BY event_date, CASE WHEN place <= 50 THEN field ELSE '(other)' END
