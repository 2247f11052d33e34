"""product.identifications: the valid identify events, each once; what it takes to be valid is what product.events asks."""

from __future__ import annotations

import pyarrow as pa

from lakehouse.declarations import load_declarations
from lakehouse.queries import bind_sql
from lakehouse.transforms import Inputs
from transforms.product.events import ALLOWED
from transforms.product.parsing import parse

INPUTS = ("raw.product_events",)

# Only what can be such an event is parsed: a JSON text holds the name as it is, or with escapes in place of its letters.
FEW = """
CREATE OR REPLACE TEMP TABLE records AS
SELECT topic, partition, "offset", received_at, payload
FROM raw.product_events
WHERE regexp_matches(try(decode(payload)), $names)
"""
STATED = """
SELECT anonymous_id, event_id, occurred_at, user_id, received_at, topic, partition, "offset"
FROM parsed
WHERE reason IS NULL AND list_contains($names, event_name) AND anonymous_id IS NOT NULL AND user_id IS NOT NULL
"""


def build(inputs: Inputs) -> pa.Table:
    """One row an identify event that names both an anonymous id and a user; what is refused product.events tells of."""
    names = inputs.reference("identity")["identify_events"]
    inputs.sql(FEW, names="|".join([*(f'"{name}"' for name in names), r"\\u00"]))
    bind_sql(inputs.connection, "raw.product_events", "records")
    parse(inputs.connection, load_declarations(inputs.catalog_dir)["product.events"], ALLOWED)
    return inputs.sql(STATED, names=names)
