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
    topic, partition, "offset", received_at,
    -- Of several items the one that sells a plan is the subscription's, and not an add-on that happens to come first.
    CASE WHEN f[7] = 'subscription' AND json_array_length(body, '$.data.object.items.data') > 1
        THEN CAST(json_merge_patch(body, json_object('data', json_object('object', json_object('items', json_object('data', [
            json_extract(body, '$.data.object.items.data[' || (coalesce(list_position(list_transform(
                json_extract_string(body, '$.data.object.items.data[*].price.product'),
                lambda p: list_contains($plan_products, p)
            ), true), 1) - 1) || ']')
        ]))))) AS VARCHAR)
        ELSE body END AS body,
    f[1] AS event_id, f[2] AS event_type, try(to_timestamp(TRY_CAST(f[3] AS BIGINT))) AS created_at, f[4] AS api_version,
    coalesce(f[5], 'platform') AS account, TRY_CAST(f[6] AS BOOLEAN) AS livemode, f[7] AS object_type, f[8] AS object_id,
    CASE
        WHEN body IS NULL OR NOT is_object THEN 'not_json'
        WHEN f[7] IN (SELECT unnest($known)) AND f[2] IS DISTINCT FROM 'invoice.upcoming'
            AND (f[1] IS NULL OR f[2] IS NULL OR f[8] IS NULL
                OR try(to_timestamp(TRY_CAST(f[3] AS BIGINT))) IS NULL OR TRY_CAST(f[6] AS BOOLEAN) IS NULL)
            THEN 'incomplete_event'
        -- a clock that far ahead would put the event behind all others of its object for a long time
        WHEN try(to_timestamp(TRY_CAST(f[3] AS BIGINT))) > received_at + INTERVAL 1 DAY THEN 'created_in_the_future'
    END AS reason
FROM fields
"""

# What no table downstream could hold is judged row by row, so that one event does not hold up all the others.
NORMALISED = """
CREATE OR REPLACE TEMP TABLE normalised AS
SELECT
    * EXCLUDE (reason),
    CASE
        WHEN object_type = 'subscription' AND (state ->> '$.customer_id') IS NULL THEN 'no_customer'
        WHEN object_type = 'subscription' AND NOT coalesce((state ->> '$.status') IN (SELECT unnest($statuses)), false)
            THEN 'unknown_status'
    END AS reason
FROM ({per_type})
"""

# Repeats of an event inside the batch: the first receipt wins, whatever the order of the rows.
VERSIONS = """
SELECT
    account, livemode, event_id, event_type, object_type, object_id, state ->> '$.customer_id' AS customer_id, created_at,
    api_version, deleted, rank, state, previous, received_at AS recorded_at, topic, partition, "offset"
FROM normalised
WHERE reason IS NULL
QUALIFY row_number() OVER (
    PARTITION BY account, livemode, event_id, object_id ORDER BY received_at, topic, partition, "offset"
) = 1
"""

REJECTED = """
SELECT topic, partition, "offset", received_at, reason, coalesce(event_type, 'no event type') AS detail
FROM (
    SELECT topic, partition, "offset", received_at, reason, event_type FROM parsed
    UNION ALL
    SELECT topic, partition, "offset", received_at, reason, event_type FROM normalised
)
WHERE reason IS NOT NULL
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
    """The SQL that normalises one object type: each column is the first of its paths that the payload carries.

    A path whose parent is an explicit null is null too (`address: null` says that there is no country).
    """
    paths: dict[str, int] = {}
    state: list[str] = []
    previous: list[str] = []
    for name, candidates in columns.items():
        parents = [parent for path in candidates for parent in _parents(path)]
        for path in (*candidates, *parents):
            paths.setdefault(path, len(paths) + 1)
        for entries, source in ((state, "found"), (previous, "before")):
            value = ", ".join(f"{source}[{paths[p]}]" for p in candidates)
            if parents:
                value += "".join(
                    f", CASE WHEN CAST({source}[{paths[p]}] AS VARCHAR) = 'null' THEN 'null'::JSON END" for p in parents
                )
            # concat_ws leaves NULLs out: a column that is not carried does not appear
            entries.append(f"'\"{name}\":' || coalesce({value})")
    return PER_TYPE.format(
        object_type=object_type,
        state=", ".join(state),
        previous=", ".join(previous),
        object_paths=", ".join(f"'$.data.object.{p}'" for p in paths),
        previous_paths=", ".join(f"'$.data.previous_attributes.{p}'" for p in paths),
    )


def _parents(path: str) -> list[str]:
    """`a.b[0].c` -> [`a`, `a.b[0]`]: the objects that a path goes through."""
    steps = path.split(".")
    return [".".join(steps[:n]) for n in range(1, len(steps))]


def build(inputs: Inputs) -> Built:
    """Normalise the new rows of raw.stripe_events; unknown object types are left out, broken ones rejected."""
    objects: dict[str, dict[str, list[str]]] = inputs.reference("stripe_objects")
    connection = inputs.connection
    plans = [row["product_id"] for row in inputs.reference("plans")]
    connection.execute(PARSED, {"known": list(objects), "plan_products": plans})
    normalised = " UNION ALL ".join(_per_type(name, columns) for name, columns in objects.items())
    statuses = [row["status"] for row in inputs.reference("statuses")]
    connection.execute(NORMALISED.format(per_type=normalised), {"statuses": statuses})
    rows = connection.execute(VERSIONS).to_arrow_table()
    rejected: pa.Table = connection.execute(REJECTED).to_arrow_table()
    return Built(rows, rejected)
