"""billing.event_versions: one typed, deduplicated row for each distinct Stripe event about an object we keep.

The normaliser is data (catalog/reference/stripe_objects.yaml) and the SQL made from it (transforms/stripe_shapes.py). What is
here reads the envelope and judges it, row by row, so that one odd event holds up nobody.
"""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from lakehouse.coordinates import COORDINATES
from lakehouse.copies import conflict_letters, first_copies, of_one_object
from lakehouse.payloads import payload_text
from lakehouse.plans import frame
from lakehouse.queries import epoch_time, fetch, text
from lakehouse.transforms import Built, Inputs
from transforms.stripe_shapes import nested_sql, normalise_sql, object_types, shapes

INPUTS = ("raw.stripe_events",)

KEY = ("account", "livemode", "event_id", "object_id")
FIRST_BY = ("recorded_at", *COORDINATES)
CONTENT = ("event_type", "object_type", "created_at", "state", "previous")
"""What two deliveries of one event must agree in; delivery fields (`pending_webhooks`) are not among what is kept."""


def _plan_item(at: str) -> str:
    """SQL: `body` with, of several items at a path, only the one that sells a plan: that is the subscription's."""
    chosen = f"""json_extract(body, '{at}.items.data[' || (coalesce(list_position(list_transform(
            json_extract_string(body, '{at}.items.data[*].price.product'), lambda p: list_contains($plan_products, p)
        ), true), 1) - 1) || ']')"""
    steps = [f"'{step}', json_object(" for step in at.split(".")[1:]]
    nested = f"json_object({''.join(steps)}'items', json_object('data', [{chosen}]){')' * len(steps)})"
    return f"""CASE WHEN f[7] = 'subscription' AND json_array_length(body, '{at}.items.data') > 1
        THEN CAST(json_merge_patch(body, {nested}) AS VARCHAR) ELSE body END"""


# An object fetched from the API has no event around it: it is a version at the response's `Date`.
PARSED = f"""
CREATE OR REPLACE TEMP TABLE parsed AS
WITH decoded AS (
    SELECT
        topic, partition, "offset", received_at, {{recorded}} AS recorded_at, source, {payload_text()} AS body,
        try(decode(list_filter(headers, lambda x: lower(x.key) = 'date')[-1].value)) AS date
    FROM raw.stripe_events
),
checked AS (
    -- what is not a JSON object is no body
    SELECT * REPLACE (CASE WHEN json_valid(body) THEN CASE WHEN json_type(body) = 'OBJECT' THEN body END END AS body) FROM decoded
),
enveloped AS (
    SELECT
        * REPLACE (CASE WHEN is_bare THEN CAST(json_object(
            'id', 'snapshot_' || md5(concat_ws('/', body ->> '$.object', body ->> '$.id', epoch_ms(fetched_at) // 1000)),
            'type', (body ->> '$.object') || '.snapshot',
            'created', epoch_ms(fetched_at) // 1000,
            'livemode', json_extract(body, '$.livemode'),
            'data', json_object('object', json(body))
        ) AS VARCHAR) ELSE body END AS body)
    FROM (
        SELECT
            *,
            coalesce(source = 'api_snapshot' AND (body ->> '$.object') <> 'event', false) AS is_bare,
            coalesce(
                TRY_CAST(date AS TIMESTAMPTZ),
                try_strptime(regexp_replace(date, ' GMT$', ' +0000'), '%a, %d %b %Y %H:%M:%S %z'),
                received_at
            ) AS fetched_at
        FROM checked
    )
),
fields AS (
    SELECT *, json_extract_string(body, [
        '$.id', '$.type', '$.created', '$.api_version', '$.account', '$.livemode', '$.data.object.object', '$.data.object.id'
    ]) AS f FROM enveloped
),
chosen AS (
    SELECT * REPLACE ({_plan_item("$.data.object")} AS body), body AS whole FROM fields
),
objects AS (
    SELECT * REPLACE ({_plan_item("$.data.previous_attributes")} AS body), false AS nested FROM chosen
    UNION ALL
    SELECT * EXCLUDE (nested_type, inner_object) REPLACE (
        CAST(json_object('data', json_object('object', inner_object)) AS VARCHAR) AS body,
        CAST(json_object('data', json_object('object', inner_object)) AS VARCHAR) AS whole,
        [f[1], f[2], f[3], f[4], f[5], f[6], nested_type, inner_object ->> '$.id'] AS f
    ), true AS nested
    FROM ({{nested}}) WHERE (inner_object ->> '$.id') IS NOT NULL
)
SELECT
    topic, partition, "offset", received_at, recorded_at, source, nested, whole, body,
    f[1] AS event_id, f[2] AS event_type, {epoch_time("f[3]")} AS created_at, f[4] AS api_version,
    coalesce(f[5], 'platform') AS account, TRY_CAST(f[6] AS BOOLEAN) AS livemode,
    coalesce({{kept_as}}[f[7]], f[7]) AS object_type, f[8] AS object_id,
    CASE
        WHEN body IS NULL THEN 'not_json'
        -- a preview: by design it has no id, and nothing came to be
        WHEN f[2] = 'invoice.upcoming' OR {{kept_as}}[f[7]] IS NULL THEN 'ignored'
        WHEN f[1] IS NULL OR f[2] IS NULL OR f[8] IS NULL
            OR {epoch_time("f[3]")} IS NULL OR TRY_CAST(f[6] AS BOOLEAN) IS NULL
            THEN 'incomplete_event'
        -- a clock that far ahead would put the event behind all others of its object for a long time
        WHEN {epoch_time("f[3]")} > received_at + INTERVAL 1 DAY THEN 'created_in_the_future'
    END AS reason
FROM objects
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

VERSIONS = """
SELECT
    account, livemode, event_id, event_type, object_type, object_id, state ->> '$.customer_id' AS customer_id, created_at,
    api_version, source, nested, deleted, rank, state, previous, extra, recorded_at, topic, partition, "offset"
FROM normalised
WHERE reason IS NULL
"""

REJECTED = """
SELECT topic, partition, "offset", received_at, reason, coalesce(event_type, 'no event type') AS detail
FROM (
    SELECT topic, partition, "offset", received_at, reason, event_type FROM parsed WHERE reason <> 'ignored' AND NOT nested
    UNION ALL
    SELECT topic, partition, "offset", received_at, reason, event_type FROM normalised
)
WHERE reason IS NOT NULL
"""


def build(inputs: Inputs) -> Built:
    """Normalise the new rows of raw.stripe_events; unknown object types are left out and counted, broken ones rejected.

    Of several deliveries of an event the first receipt counts, whatever the order of the rows; one that says something else, or
    is about another object, is rejected as `conflicting_copy`.
    """
    reference = inputs.reference("stripe_objects")
    connection = inputs.connection
    kept_as = "MAP {" + ", ".join(f"{text(k)}: {text(v)}" for k, v in object_types(reference).items()) + "}"
    # what was a dead letter is known from its replay on
    given = fetch(connection, "SELECT * FROM raw.stripe_events LIMIT 0").column_names
    recorded = "greatest(received_at, understood_at)" if "understood_at" in given else "received_at"
    connection.execute(
        PARSED.format(nested=nested_sql(reference), kept_as=kept_as, recorded=recorded),
        {"plan_products": [row["product_id"] for row in inputs.reference("plans")]},
    )
    per_type = " UNION ALL ".join(normalise_sql(name, spec) for name, spec in shapes(reference).items())
    statuses = [row["status"] for row in inputs.reference("statuses")]
    connection.execute(NORMALISED.format(per_type=per_type), {"statuses": statuses})
    found = frame(connection, VERSIONS)
    rejected: pa.Table = fetch(connection, REJECTED)
    ((ignored,),) = connection.execute("SELECT count(*) FROM parsed WHERE reason = 'ignored' AND NOT nested").fetchall()
    found, others = of_one_object(
        found.with_columns(own=~pl.col("nested")),
        record=["account", "livemode", "event_id"],
        own="own",
        about="object_id",
        first_by=FIRST_BY,
        delivery=COORDINATES,
    )
    rows, conflicts = first_copies(found, keys=KEY, first_by=FIRST_BY, content=CONTENT)
    told = conflict_letters(pl.concat([others, conflicts]), "recorded_at")
    rows, letters = rows.drop("own"), pa.concat_tables([rejected, told], promote_options="permissive")
    return Built(rows.to_arrow(), letters, ignored)
