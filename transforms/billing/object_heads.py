"""billing.object_heads: what the versions of each object add up to."""

from __future__ import annotations

import msgspec
import polars as pl
import pyarrow as pa

from lakehouse.chains import sequence_in_second
from lakehouse.transforms import Inputs
from transforms.life_cycles import progress_of

INPUTS = ("billing.event_versions",)

KEYS = ["account", "livemode", "object_id"]
VERSIONS = """
SELECT
    account, livemode, object_id, object_type, customer_id, event_id, event_type, created_at, deleted, rank, state, previous,
    recorded_at, hash(list_sort(json_keys(state))) AS shape
FROM billing.event_versions
"""


def build(inputs: Inputs) -> pa.Table:
    """One row an object: its last version in event order, with each column as last carried."""
    found = pl.DataFrame(inputs.sql(VERSIONS))
    progress = progress_of(inputs.reference("life_cycles"))
    ordered = sequence_in_second(found, keys=KEYS, time="created_at", progress=progress).sort(*KEYS, "created_at", "sequence")
    last = ordered.group_by(KEYS, maintain_order=True).last().drop("previous", "sequence", "shape")
    # of versions that carry the same columns the last says all: few are left to be merged, whatever the length of the history
    shapes = ordered.unique([*KEYS, "shape"], keep="last", maintain_order=True)
    states = shapes.group_by(KEYS, maintain_order=True).agg(pl.col("state"))["state"]
    merged = pl.Series("state", [_merged(of_object) for of_object in states.to_list()], pl.String)
    return last.with_columns(merged).to_arrow()


def _merged(states: list[str]) -> str:
    """Several states, in order, as one: each column as last carried. As text it is the same from a head and from all versions."""
    if len(states) == 1:
        return states[0]
    found: dict[str, object] = {}
    last: dict[str, object] = {}
    for state in states:
        last = msgspec.json.decode(state)
        found |= last
    return states[-1] if len(found) == len(last) else msgspec.json.encode(found, order="sorted").decode()
