"""billing.event_versions: one typed, deduplicated row for each distinct Stripe event about an object we keep.

The normaliser is data (catalog/reference/stripe_objects.yaml): for each object type its columns, and the paths at which
each API version carries them. The same paths read `data.object` and `data.previous_attributes`, so that versions of
different shapes can be compared.
"""

from __future__ import annotations

import pyarrow as pa

from lakehouse.transforms import Built, Inputs

INPUTS = ("raw.stripe_events",)

PARSED = """
CREATE OR REPLACE TEMP TABLE parsed AS
WITH decoded AS (
    SELECT topic, partition, "offset", received_at, try(decode(payload)) AS body FROM raw.stripe_events
),
checked AS (
    SELECT *, CASE WHEN json_valid(body) THEN json_type(body) = 'OBJECT' ELSE false END AS is_object FROM decoded
),
fields AS (
    SELECT *, json_extract_string(CASE WHEN is_object THEN body END, [
        '$.id', '$.type', '$.created', '$.api_version', '$.account', '$.livemode', '$.data.object.object', '$.data.object.id'
    ]) AS f FROM checked
)
SELECT
    topic, partition, "offset", received_at, body,
    f[1] AS event_id, f[2] AS event_type, to_timestamp(TRY_CAST(f[3] AS BIGINT)) AS created_at, f[4] AS api_version,
    coalesce(f[5], 'platform') AS account, TRY_CAST(f[6] AS BOOLEAN) AS livemode, f[7] AS object_type, f[8] AS object_id,
    CASE
        WHEN body IS NULL OR NOT is_object THEN 'not_json'
        WHEN f[7] IN (SELECT unnest($known)) AND f[2] IS DISTINCT FROM 'invoice.upcoming'
            AND (f[1] IS NULL OR f[2] IS NULL OR f[8] IS NULL
                OR TRY_CAST(f[3] AS BIGINT) IS NULL OR TRY_CAST(f[6] AS BOOLEAN) IS NULL)
            THEN 'incomplete_event'
    END AS reason
FROM fields
"""

# Repeats of an event inside the batch: the first receipt wins, whatever the order of the rows.
VERSIONS = """
SELECT
    account, livemode, event_id, event_type, object_type, object_id, state ->> '$.customer_id' AS customer_id, created_at,
    api_version, deleted, rank, state, previous, received_at AS recorded_at, topic, partition, "offset"
FROM ({per_type})
QUALIFY row_number() OVER (PARTITION BY account, livemode, event_id ORDER BY received_at, topic, partition, "offset") = 1
"""

PER_TYPE = """
SELECT
    * EXCLUDE (body, found, before),
    -- customer.subscription.deleted is a change to canceled, not the end of the object's history
    event_type LIKE '%.deleted' AND object_type <> 'subscription' AS deleted,
    CASE WHEN event_type LIKE '%.created' THEN 0 WHEN event_type LIKE '%.deleted' THEN 2 ELSE 1 END AS rank,
    '{{' || concat_ws(',', {state}) || '}}' AS state,
    CASE WHEN said THEN '{{' || concat_ws(',', {previous}) || '}}' END AS previous
FROM (
    SELECT
        *,
        json_extract(body, [{object_paths}]) AS found,
        json_extract(body, [{previous_paths}]) AS before,
        json_extract(body, '$.data.previous_attributes') IS NOT NULL AS said
    FROM parsed
    -- invoice.upcoming is a preview: by design it has no id, and nothing came to be
    WHERE object_type = '{object_type}' AND reason IS NULL AND event_type <> 'invoice.upcoming'
)
"""


def _per_type(object_type: str, columns: dict[str, list[str]]) -> str:
    """The SQL that normalises one object type: each column is the first of its paths that the payload carries."""
    paths: list[str] = []
    state: list[str] = []
    previous: list[str] = []
    for name, candidates in columns.items():
        places = range(len(paths) + 1, len(paths) + 1 + len(candidates))
        paths += candidates
        for entries, source in ((state, "found"), (previous, "before")):
            # concat_ws leaves NULLs out: a column that is not carried does not appear
            entries.append(f"'\"{name}\":' || coalesce({', '.join(f'{source}[{i}]' for i in places)})")
    return PER_TYPE.format(
        object_type=object_type,
        state=", ".join(state),
        previous=", ".join(previous),
        object_paths=", ".join(f"'$.data.object.{p}'" for p in paths),
        previous_paths=", ".join(f"'$.data.previous_attributes.{p}'" for p in paths),
    )


def build(inputs: Inputs) -> Built:
    """Normalise the new rows of raw.stripe_events; unknown object types are left out, broken ones rejected."""
    objects: dict[str, dict[str, list[str]]] = inputs.reference("stripe_objects")
    connection = inputs.connection
    connection.execute(PARSED, {"known": list(objects)})
    rows = connection.execute(
        VERSIONS.format(per_type=" UNION ALL ".join(_per_type(name, columns) for name, columns in objects.items()))
    ).to_arrow_table()
    rejected: pa.Table = connection.execute(
        "SELECT topic, partition, \"offset\", received_at, reason, coalesce(event_type, 'no event type') AS detail "
        "FROM parsed WHERE reason IS NOT NULL"
    ).to_arrow_table()
    return Built(rows, rejected)
