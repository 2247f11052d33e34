"""What we hold of Stripe, in the form in which it can be compared: event ids, and the last value of each field of an object.

What Stripe answers goes through the same normaliser as every webhook, so that two renderings of one state compare as equal.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
import polars as pl
import pyarrow as pa
from pyiceberg.io.pyarrow import schema_to_pyarrow

from lakehouse.chains import sequence_in_second
from lakehouse.declarations import load_reference
from lakehouse.drift import OBJECT, VALUES
from lakehouse.lake import Lake
from lakehouse.live import files_where
from lakehouse.positions import vector_of
from lakehouse.predicates import all_of, at_least, below, equal, one_of
from lakehouse.queries import bind_arrow, connect, files_sql
from lakehouse.transforms import Inputs, load_transform

RAW, VERSIONS = "raw.stripe_events", "billing.event_versions"
PLATFORM = "platform"
"""How our own account is called where Stripe names none."""

SNAPSHOT = "api_snapshot"
VERSION_COLUMNS = [*OBJECT, "event_id", "created_at", "rank", "deleted", "state", "previous"]


def snapshot_event(
    body: bytes, object_type: str, object_id: str, at: int, *, livemode: bool, version: str, account: str | None
) -> bytes:
    """An object fetched from the API as an event: the state that was seen at `at`, the response's `Date` (epoch seconds).

    The object stays byte for byte. `previous_attributes` is empty: nothing is said to have changed at that moment, so that among
    events of the same second the snapshot takes its place after the state that it shows.
    """
    named = {"account": account} if account else {}
    return msgspec.json.encode(
        {
            "id": f"snap_{object_id}_{at}",
            "object": "event",
            **named,
            "api_version": version,
            "created": at,
            "livemode": livemode,
            "type": f"{object_type}.{SNAPSHOT}{'.deleted' if is_deleted(body) else ''}",
            "data": {"object": msgspec.Raw(body), "previous_attributes": {}},
        }
    )


def is_deleted(body: bytes) -> bool:
    """Whether an object as fetched is what Stripe leaves of a deleted one: its id and `"deleted": true`."""
    return b'"deleted"' in body and json.loads(body).get("deleted") is True


def held_events(lake: Lake, account: str | None, livemode: bool, start: datetime, end: datetime) -> pl.DataFrame:
    """The events created in [start, end) that raw holds, delivered or fetched: columns event_id, event_type."""
    nothing = pl.DataFrame(schema={"event_id": pl.String, "event_type": pl.String})
    if not lake.exists(RAW):
        return nothing
    table = lake.load(RAW)
    files = files_where(table, all_of((at_least("created_at", start), below("created_at", end))))
    if not files:
        return nothing
    with connect(lake.settings) as connection:
        rows = connection.execute(
            f"SELECT event_id, any_value(event_type) AS event_type FROM {files_sql(table, files)} "
            "WHERE created_at >= $start AND created_at < $end AND livemode = $livemode "
            "AND coalesce(account, $platform) = $account AND event_id IS NOT NULL "
            "AND source IS DISTINCT FROM $snapshot GROUP BY event_id",
            {
                "start": start,
                "end": end,
                "livemode": livemode,
                "platform": PLATFORM,
                "account": account or PLATFORM,
                "snapshot": SNAPSHOT,
            },
        ).to_arrow_table()
    return pl.DataFrame(rows)


def not_built_yet(lake: Lake) -> set[str]:
    """Ids of the objects of which raw holds records that the canonical table has not taken up yet."""
    if not lake.exists(RAW):
        return set()
    table = lake.load(RAW)
    reached = vector_of(lake.load(VERSIONS).metadata, VERSIONS) if lake.exists(VERSIONS) else {}
    found: set[str] = set()
    for (topic, partition), end in vector_of(table.metadata, RAW).items():
        start = reached.get((topic, partition), 0)
        if start < end:
            wanted = all_of((equal("topic", topic), equal("partition", partition), at_least("offset", start)))
            keys = table.scan(wanted, selected_fields=("key",)).to_arrow().column("key").to_pylist()
            found |= {key.decode(errors="replace").rpartition(":")[2] for key in keys if key}  # `account:object`
    return found


@dataclass(frozen=True)
class Fetched:
    """Fetched objects, normalised. versions: VERSION_COLUMNS (`event_id`: the snapshot's); refused: {event_id: reason}."""

    versions: pl.DataFrame
    refused: dict[str, str]


def normalise(lake: Lake, events: Sequence[tuple[str, bytes]], at: datetime) -> Fetched:
    """Put snapshots, as (event id, payload), through the normaliser of the canonical table, in memory."""
    declared = lake.declaration(VERSIONS)
    transform = load_transform(lake.settings.transforms_dir, declared)
    assert transform is not None
    n = len(events)
    given = {
        "topic": ["fetched"] * n,
        "partition": pa.array([0] * n, pa.int32()),
        "offset": pa.array(range(n), pa.int64()),
        "received_at": pa.array([at] * n, pa.timestamp("us", "UTC")),
        "payload": pa.array([payload for _, payload in events], pa.binary()),
    }
    schema = schema_to_pyarrow(lake.declaration(RAW).schema(), include_field_ids=False)
    columns = [pa.array(given[f.name]).cast(f.type) if f.name in given else pa.nulls(n, f.type) for f in schema]
    with connect(lake.settings) as connection:
        bind_arrow(connection, RAW, pa.table(columns, names=schema.names))
        built = transform.build(Inputs(connection, lake.settings.catalog_dir))
    rejected = built.rejected.select(["offset", "reason"]).to_pylist() if built.rejected is not None else []
    versions = pl.DataFrame(built.rows).select(VERSION_COLUMNS)
    return Fetched(versions, {events[r["offset"]][0]: r["reason"] for r in rejected})


def held_fields(lake: Lake, objects: pl.DataFrame) -> pl.DataFrame:
    """The last value of each field of the objects (columns OBJECT) that we hold and that are not deleted: columns VALUES.

    With a column `until`, as of that moment of each object, in event time.
    """
    if not lake.exists(VERSIONS) or objects.is_empty():
        return pl.DataFrame(schema=VALUES)
    table = lake.load(VERSIONS)
    files = files_where(table, one_of("object_id", objects["object_id"].to_list()))
    if not files:
        return pl.DataFrame(schema=VALUES)
    with connect(lake.settings) as connection:
        asked = objects if "until" in objects.columns else objects.with_columns(until=pl.lit(None, pl.Datetime("us", "UTC")))
        connection.register("__objects", asked.select(*OBJECT, "until").to_arrow())
        columns = ", ".join(f'v."{c}"' for c in VERSION_COLUMNS)
        rows = connection.execute(
            f"SELECT {columns} FROM {files_sql(table, files)} AS v JOIN __objects AS o USING ({', '.join(OBJECT)}) "
            "WHERE o.until IS NULL OR v.created_at <= o.until"
        )
        versions = pl.DataFrame(rows.to_arrow_table())
    return last_fields(lake, versions)


def held_since(lake: Lake, objects: pl.DataFrame) -> pl.DataFrame:
    """Those of the objects (columns OBJECT, since, until) that changed in (since, until], in event time: columns OBJECT."""
    nothing = objects.select(OBJECT).clear()
    if not lake.exists(VERSIONS) or objects.is_empty():
        return nothing
    table = lake.load(VERSIONS)
    files = files_where(table, one_of("object_id", objects["object_id"].to_list()))
    if not files:
        return nothing
    with connect(lake.settings) as connection:
        connection.register("__objects", objects.select(*OBJECT, "since", "until").to_arrow())
        named = ", ".join(f'o."{c}"' for c in OBJECT)
        rows = connection.execute(
            f"SELECT DISTINCT {named} FROM {files_sql(table, files)} AS v JOIN __objects AS o USING ({', '.join(OBJECT)}) "
            "WHERE v.created_at > o.since AND v.created_at <= o.until"
        )
        return pl.DataFrame(rows.to_arrow_table())


FIELDS = """
WITH present AS (
    SELECT * FROM __versions
    QUALIFY NOT arg_max(deleted, (created_at, sequence)) OVER (PARTITION BY account, livemode, object_type, object_id)
),
fields AS (
    SELECT account, livemode, object_type, object_id, created_at, sequence, state, unnest(json_keys(state)) AS field FROM present
)
SELECT
    account, livemode, object_type, object_id, field,
    CAST(arg_max(json_extract(state, '$."' || field || '"'), (created_at, sequence)) AS VARCHAR) AS value
FROM fields
GROUP BY ALL
"""


def last_fields(lake: Lake, versions: pl.DataFrame) -> pl.DataFrame:
    """The last value carried of each field, in order of events (VERSION_COLUMNS -> VALUES); deleted objects are left out."""
    if versions.is_empty():
        return pl.DataFrame(schema=VALUES)
    ordered = sequence_in_second(versions, keys=OBJECT, time="created_at")
    with connect(lake.settings) as connection:
        connection.register("__versions", ordered.to_arrow())
        found = pl.DataFrame(connection.execute(FIELDS).to_arrow_table())
    # an object or a list has no one spelling in JSON
    nested = pl.col("value").str.contains(r"^[\[{]")
    return found.with_columns(
        pl.when(nested).then(pl.col("value").map_elements(one_spelling, pl.String)).otherwise(pl.col("value")).alias("value")
    ).select(list(VALUES))


def one_spelling(text: str) -> str:
    """JSON text with its keys in order."""
    return json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) if text[:1] in "[{" else text


def without_renderings(lake: Lake, found: pl.DataFrame) -> pl.DataFrame:
    """Leave out of what was found (columns FOUND) where the API version alone makes the difference.

    Such are the columns of catalog/reference/stripe_renderings.yaml, and lists of parts (a subscription's items) in which both
    sides agree on all that both carry.
    """
    rendered = frozenset(load_reference(lake.settings.catalog_dir, "stripe_renderings"))
    shapes = load_reference(lake.settings.catalog_dir, "stripe_objects")
    lists = {(kind, name) for kind, shape in shapes.items() if isinstance(shape, dict) for name in shape.get("lists", {})}
    columns = ("object_type", "field", "state", "ours", "theirs")
    same = [
        field in rendered
        or ((kind, field) in lists and state == "differs" and agree(json.loads(ours), json.loads(theirs), rendered))
        for kind, field, state, ours, theirs in found.select(columns).iter_rows()
    ]
    return found.filter(~pl.Series(same, dtype=pl.Boolean))


def agree(ours: Any, theirs: Any, rendered: Collection[str] = ()) -> bool:
    """Whether two JSON values say the same where both say something: a key that one of them lacks is not carried by it."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        common = (ours.keys() & theirs.keys()) - set(rendered)
        return all(agree(ours[key], theirs[key], rendered) for key in common)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(agree(o, t, rendered) for o, t in zip(ours, theirs, strict=True))
    return bool(ours == theirs)


def held_objects(lake: Lake, account: str, livemode: bool, object_type: str) -> dict[str, int]:
    """Objects of one type that we know and that are not deleted: {id: since when (epoch seconds)}."""
    if not lake.exists(VERSIONS):
        return {}
    table = lake.load(VERSIONS)
    files = files_where(table, equal("object_type", object_type))
    if not files:
        return {}
    with connect(lake.settings) as connection:
        rows = connection.execute(
            f"SELECT object_id, epoch(min(created_at))::BIGINT FROM {files_sql(table, files)} WHERE object_type = $type "
            "AND livemode = $livemode AND account = $account GROUP BY object_id "
            "HAVING NOT arg_max(deleted, (created_at, rank))",
            {"type": object_type, "livemode": livemode, "account": account},
        ).fetchall()
    return dict(rows)
