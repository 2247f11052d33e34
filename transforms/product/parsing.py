"""Raw product events -> typed rows, and for each that cannot be used the reason."""

from __future__ import annotations

import duckdb

# Top-level fields of an event: which must be JSON strings, which are kept as JSON text, which are numbers.
TEXT = (
    "event_id", "event_name", "occurred_at", "sent_at", "workspace_id", "user_id", "anonymous_id", "session_id", "feature",
    "platform", "app_version", "country", "ip", "user_agent",
)  # fmt: skip
NESTED = ("properties", "context")
NUMBERS = ("schema_version",)
FIELDS = (*TEXT, *NESTED, *NUMBERS)
REQUIRED = ("event_id", "event_name", "occurred_at")

# An instant with its zone; anything else (no zone, an epoch number) is refused rather than guessed.
INSTANT = r"^\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}:\d{2}(\.\d{1,9})?(Z|[+-]\d{2}(:?\d{2})?)$"

# Normal up to 72 h late, accepted and flagged up to 30 days, else (or more than 10 min ahead) refused.
LATE, TOO_LATE, TOO_EARLY = "INTERVAL 72 HOUR", "INTERVAL 30 DAY", "INTERVAL 10 MINUTE"


def _parse_sql() -> str:
    paths = ", ".join(f"'$.{f}'" for f in FIELDS)
    at = {f: i for i, f in enumerate(FIELDS, start=1)}
    values = ", ".join(f'v[{at[f]}] AS "{f}"' for f in (*TEXT, *NESTED) if not f.endswith("_at"))
    missing = " ".join(f"WHEN v[{at[f]}] IS NULL THEN 'missing_{f}'" for f in REQUIRED)
    wrong = " ".join(f"WHEN t[{at[f]}] NOT IN ('VARCHAR', 'NULL') THEN 'wrong_type_{f}'" for f in TEXT)
    declared = "{" + ", ".join(f'"{f}": null' for f in FIELDS) + "}"
    return f"""
    CREATE OR REPLACE TEMP TABLE parsed AS
    WITH decoded AS (
        SELECT topic, partition, "offset", received_at, payload IS NULL AS tombstone, try(decode(payload)) AS body
        FROM raw.product_events
    ),
    checked AS (
        SELECT *, CASE WHEN json_valid(body) THEN json_type(body) = 'OBJECT' ELSE false END AS is_object FROM decoded
    ),
    fields AS (
        SELECT
            topic, partition, "offset", received_at, tombstone, is_object,
            json_extract_string(CASE WHEN is_object THEN body END, [{paths}]) AS v,
            json_type(CASE WHEN is_object THEN body END, [{paths}]) AS t,
            CASE WHEN is_object AND len(list_filter(json_keys(body), lambda k: NOT list_contains($fields, k))) > 0
                THEN CAST(json_merge_patch(body, '{declared}') AS VARCHAR) END AS extra
        FROM checked
    ),
    typed AS (
        SELECT
            topic, partition, "offset", received_at, tombstone, is_object, v, t, extra, {values},
            CASE WHEN regexp_matches(v[{at["occurred_at"]}], '{INSTANT}')
                THEN TRY_CAST(v[{at["occurred_at"]}] AS TIMESTAMPTZ) END AS occurred_at,
            CASE WHEN regexp_matches(v[{at["sent_at"]}], '{INSTANT}')
                THEN TRY_CAST(v[{at["sent_at"]}] AS TIMESTAMPTZ) END AS sent_at,
            TRY_CAST(v[{at["schema_version"]}] AS INTEGER) AS schema_version
        FROM fields
    )
    SELECT
        * EXCLUDE (v, t, tombstone, is_object),
        epoch_ms(received_at) // 1000 - epoch_ms(occurred_at) // 1000 AS lateness_seconds,
        received_at - occurred_at > {LATE} AS late,
        CASE
            WHEN tombstone THEN 'tombstone'
            WHEN NOT is_object THEN 'not_json'
            {missing}
            {wrong}
            WHEN occurred_at IS NULL THEN 'bad_occurred_at'
            WHEN occurred_at < received_at - {TOO_LATE} THEN 'too_late'
            WHEN occurred_at > received_at + {TOO_EARLY} THEN 'from_the_future'
        END AS reason
    FROM typed
    """


def parse(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the relation `parsed` from raw.product_events: coordinates, typed columns, and `reason`: NULL if the row is good."""
    connection.execute(_parse_sql(), {"fields": list(FIELDS)})
