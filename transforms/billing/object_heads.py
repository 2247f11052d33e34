"""billing.object_heads: what the versions of each object add up to."""

from __future__ import annotations

import itertools

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
    recorded_at
FROM billing.event_versions
"""


def build(inputs: Inputs) -> pa.Table:
    """One row an object: its last version in event order, with each column as last carried."""
    found = pl.DataFrame(inputs.sql(VERSIONS))
    progress = progress_of(inputs.reference("life_cycles"))
    ordered = sequence_in_second(found, keys=KEYS, time="created_at", progress=progress).sort(*KEYS, "created_at", "sequence")
    sizes = ordered.group_by(KEYS, maintain_order=True).len()["len"].to_list()
    last = ordered.group_by(KEYS, maintain_order=True).last()
    states = iter(ordered["state"].to_list())
    merged = pl.Series("state", [_merged(itertools.islice(states, size), size) for size in sizes], pl.String)
    return last.with_columns(merged).drop("previous", "sequence").to_arrow()


def _merged(states: itertools.islice[str], size: int) -> str:
    """Several states, in order, as one: each column as last carried."""
    if size == 1:
        return next(states)
    found: dict[str, object] = {}
    for state in states:
        found |= msgspec.json.decode(state)
    return msgspec.json.encode(found).decode()
