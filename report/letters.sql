-- Records that could not be used and are still refused, by table and reason.
SELECT consumer, reason, count(*) AS records, max(received_at) AS last_received_at
FROM ops.dead_letters
WHERE resolved_at IS NULL
GROUP BY consumer, reason
ORDER BY consumer, records DESC, reason
