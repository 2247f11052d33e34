"""Stripe webhooks -> raw.stripe_events: the envelope fields needed to prune are read out; the body is kept as it came."""

from __future__ import annotations

import duckdb
import pyarrow as pa

from lakehouse.queries import epoch_time


def _date(time: str) -> str:
    """SQL: a time, NULL outside the years 1 to 9999 (`infinity`): no reader could hold that."""
    return f"CASE WHEN {time} BETWEEN TIMESTAMPTZ '0001-01-01' AND TIMESTAMPTZ '9999-12-31 23:59:59' THEN {time} END"


# The receiver checked signature and JSON; what cannot be read all the same stays NULL here and is judged downstream.
ENVELOPE = f"""
SELECT
    * EXCLUDE (h_received_at, h_source, f),
    -- a record that did not come through our receiver may say nothing: then it was received by now
    coalesce({_date("TRY_CAST(h_received_at AS TIMESTAMPTZ)")}, kafka_timestamp, now()) AS received_at,
    CASE WHEN h_source IN ('webhook', 'events_api', 'api_snapshot') THEN h_source END AS source,
    f[1] AS event_id, f[2] AS event_type, {epoch_time("f[3]")} AS created_at,
    f[4] AS api_version, f[5] AS account, TRY_CAST(f[6] AS BOOLEAN) AS livemode
FROM (
    SELECT
        *,
        -- of a header sent twice the last counts
        try(decode(list_filter(headers, lambda x: x.key = 'received_at')[-1].value)) AS h_received_at,
        try(decode(list_filter(headers, lambda x: x.key = 'source')[-1].value)) AS h_source,
        json_extract_string(
            CASE WHEN json_valid(try(decode(payload))) THEN try(decode(payload)) END,
            ['$.id', '$.type', '$.created', '$.api_version', '$.account', '$.livemode']
        ) AS f
    FROM records
)
ORDER BY topic, partition, "offset"
"""


def with_envelope(connection: duckdb.DuckDBPyConnection, records: pa.Table) -> pa.Table:
    """Raw records (writers.records.RAW_SCHEMA) with received_at, source and the Stripe envelope added."""
    connection.register("records", records)
    return connection.execute(ENVELOPE).to_arrow_table()
