"""product.identifications: the valid identify events, each once; what it takes to be valid is what product.events asks."""

from __future__ import annotations

import json

import polars as pl
import pyarrow as pa

from lakehouse.coordinates import COORDINATES
from lakehouse.declarations import load_declarations
from lakehouse.queries import bind_sql, text
from lakehouse.transforms import Inputs
from transforms.product.events import ALLOWED
from transforms.product.parsing import parse

INPUTS = ("raw.product_events",)

# Only what can be such an event is parsed: a JSON text holds the name as it is, or with escapes in place of its letters.
FEW = """
CREATE OR REPLACE TEMP TABLE records AS
SELECT topic, partition, "offset", received_at, payload
FROM (SELECT *, try(decode(payload)) AS body FROM raw.product_events)
WHERE contains(body, '\\u00'){}
"""
STATED = ("anonymous_id", "event_id", "occurred_at", "user_id", "received_at", *COORDINATES)


def build(inputs: Inputs) -> pa.Table:
    """One row an identify event that names both an anonymous id and a user; what is refused product.events tells of."""
    names = inputs.reference("identity")["identify_events"]
    named = (f" OR contains(body, {text(json.dumps(name, ensure_ascii=False))})" for name in names)
    inputs.connection.execute(FEW.format("".join(named)))
    bind_sql(inputs.connection, "raw.product_events", "records")
    parsed = parse(inputs.connection, load_declarations(inputs.catalog_dir)["product.events"], ALLOWED)
    valid = pl.col("reason").is_null() & pl.col("event_name").is_in(names)
    return parsed.filter(valid).select(STATED).drop_nulls(["anonymous_id", "user_id"]).to_arrow()
