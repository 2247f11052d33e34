"""Copies of an event, within a batch and across batches: the first receipt counts."""

from __future__ import annotations

import polars as pl

from lakehouse.plans import Plan, frame

# Of the copies of one event the first receipt counts, whatever the order and the split into batches.
UNIQUE = """
SELECT * EXCLUDE (reason) FROM parsed WHERE reason IS NULL
QUALIFY row_number() OVER (PARTITION BY event_id ORDER BY received_at, topic, partition, "offset") = 1
"""


# Events of the batch that the table has already; `precedes`: the new copy was received before the one that is there.
KNOWN = """
SELECT
    k.event_id, k.occurred_at,
    (e.received_at, e.topic, e.partition, e."offset") < (k.received_at, k.topic, k.partition, k."offset") AS precedes
FROM product.events AS k JOIN __events AS e ON e.event_id = k.event_id
WHERE k.occurred_at >= $first AND k.occurred_at <= $last
"""


def without_known(plan: Plan, events: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Leave out events that the table has from an earlier receipt; (what remains, known ids that a new copy precedes).

    A copy carries the same `occurred_at` and workspace, so only the days of the new events are looked into.
    """
    nothing = pl.DataFrame(schema={"event_id": pl.String, "occurred_at": events.schema["occurred_at"]})
    if plan.base is None or events.is_empty():
        return events, nothing
    plan.bind_own()
    plan.connection.register("__events", events.select("event_id", "received_at", "topic", "partition", "offset").to_arrow())
    known = frame(plan.connection, KNOWN, {"first": min(events["occurred_at"]), "last": max(events["occurred_at"])})
    later = known.filter(~pl.col("precedes"))
    return events.join(later, on="event_id", how="anti"), known.filter("precedes").select("event_id", "occurred_at")
