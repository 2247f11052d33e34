"""Stripe deliveries -> every billing table that is made of them, as one function over Arrow tables.

>>> from transforms.pure import billing_tables, deliveries
>>> tables = billing_tables(deliveries([(body, received_at), ...]))
>>> tables["billing.subscription_history"]
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import pyarrow as pa

from lakehouse.declarations import load_declarations
from lakehouse.in_memory import build_tables
from lakehouse.settings import Settings, load_settings
from lakehouse.transforms import load_transforms, upstream

SOURCE = "raw.stripe_events"

DELIVERIES = pa.schema(
    [
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("headers", pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))),
        ("payload", pa.binary()),
        ("received_at", pa.timestamp("us", "UTC")),
        ("source", pa.string()),
    ]
)
"""The columns of raw.stripe_events that the transforms read."""


def deliveries(bodies: Iterable[tuple[bytes, datetime]], source: str = "webhook") -> pa.Table:
    """Deliveries (body as received, time of receipt) as rows of raw.stripe_events, numbered as given."""
    rows = [
        {"topic": "stripe", "partition": 0, "offset": i, "headers": [], "payload": body, "received_at": at, "source": source}
        for i, (body, at) in enumerate(bodies)
    ]
    return pa.Table.from_pylist(rows, DELIVERIES)


def billing_tables(received: pa.Table, settings: Settings | None = None) -> dict[str, pa.Table]:
    """Every table that is made of Stripe deliveries alone, whole: a function of the set of distinct events received.

    Any order of the rows and any repetition of a delivery give the same tables, row for row once sorted by primary key. "As known
    at T" is the same function of the rows received by T.

    Args:
        received: rows of raw.stripe_events (`DELIVERIES`); coordinates must be unique.
        settings: default: from the environment.

    Returns:
        {"billing.…": rows}, and under "rejected" the records that cannot be used, with coordinates and reason.
    """
    settings = settings or load_settings()
    declarations = load_declarations(settings.catalog_dir)
    transforms = load_transforms(settings.transforms_dir, declarations)
    made: list[str] = []
    for name, transform in transforms.items():  # each comes after its inputs
        sources = upstream(declarations[name], transform)
        if declarations[name].layer == "billing" and all(s == SOURCE or s in made for s in sources):
            made.append(name)
    built = build_tables(settings, {SOURCE: received}, made)
    rejected = [b.rejected for b in built.values() if b.rejected is not None]
    tables = {name: b.rows for name, b in built.items()}
    return tables | {"rejected": pa.concat_tables(rejected, promote_options="permissive")}
