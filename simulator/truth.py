"""The truth, written from the world's own state: payloads are never read for it, save for the last state of money objects.

The rules of states, plans and which subscription is in force stand in `simulator.timeline`. Attribution of an event:

- its workspace: as sent, else the only one that its user, or the user that its device is known to be, belongs to at
  `occurred_at` (see `simulator.identity`); the user belongs to several: `ambiguous`; to none: `unmapped_workspace`;
- that workspace's mapping in force at `occurred_at`, by `effective_at` (whatever time the CRM learnt of it); two at once:
  `ambiguous`; a workspace that the CRM never knew: `unmapped_workspace`;
- that customer's plan timeline at `occurred_at`; before the customer's first subscription: `no_subscription`;
- else `resolved`, also after cancellation (the last plan, billing status canceled).

Malformed records have no truth but their number.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from simulator.attribution import RESOLVED, attributed
from simulator.marts import marts
from simulator.revenue import mrr_movements, revenue
from simulator.usage import MALFORMATIONS
from simulator.world import World

# Objects that a lake is expected to understand: `unique_known` counts the live-mode events about these.
KNOWN_OBJECTS = (
    "customer",
    "subscription",
    "product",
    "price",
    "invoice",
    "charge",
    "refund",
    "dispute",
    "payment_intent",
    "payment_method",
    "invoice_payment",
    "credit_note",
    "plan",
)
# What must be known of each object that money depends on: its status, and the amount that changes in its life.
STATES = {
    "invoice": "amount_paid",
    "payment_intent": "amount_received",
    "charge": "amount_refunded",
    "refund": "amount",
    "dispute": "amount",
}
_MOMENT = pl.Datetime("us", "UTC")
_HISTORY = {
    "subscription_id": pl.String,
    "stripe_customer_id": pl.String,
    "status": pl.String,
    "billing_status": pl.String,
    "price_id": pl.String,
    "plan": pl.String,
    "quantity": pl.Int64,
    "cancel_at_period_end": pl.Boolean,
    "pause_collection": pl.Boolean,
    "valid_from": pl.Int64,
    "valid_to": pl.Int64,
}
_TIMELINE = {
    "stripe_customer_id": pl.String,
    "subscription_id": pl.String,
    "plan": pl.String,
    "price_id": pl.String,
    "billing_status": pl.String,
    "valid_from": pl.Int64,
    "valid_to": pl.Int64,
}


def write_truth(world: World, folder: Path, withheld: Iterable[str] = ()) -> None:
    """Write the truth, one Parquet file a kind of thing (and in `marts` one a mart), and `truth.json`.

    Times are timestamps in microseconds, UTC; intervals are [valid_from, valid_to), NULL open. withheld: see `marts.marts`.
    """
    (folder / "marts").mkdir(parents=True, exist_ok=True)
    frames = {
        "product_events": product_events(world),
        "subscription_history": subscription_history(world),
        "plan_timeline": plan_timeline(world),
        "stripe_events": stripe_events(world),
        "object_states": object_states(world),
        "revenue": revenue(world.money),
        "mrr_movements": mrr_movements(world.histories.values()),
        **{f"marts/{name}": frame for name, frame in marts(world, withheld).items()},
    }
    for name, frame in frames.items():
        frame.write_parquet(folder / f"{name}.parquet", compression="zstd", compression_level=1)
    told = counts(world) | {"withheld": len(set(withheld))}
    (folder / "truth.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def subscription_history(world: World) -> pl.DataFrame:
    """All subscriptions' states, sorted by subscription and time."""
    rows = [asdict(interval) for history in world.histories.values() for interval in history]
    return _with_moments(pl.DataFrame(rows, schema=_HISTORY)).sort("subscription_id", "valid_from")


def plan_timeline(world: World) -> pl.DataFrame:
    """All customers' subscriptions in force, sorted by customer and time."""
    rows = [asdict(interval) for timeline in world.timelines.values() for interval in timeline]
    return _with_moments(pl.DataFrame(rows, schema=_TIMELINE)).sort("stripe_customer_id", "valid_from")


def stripe_events(world: World) -> pl.DataFrame:
    """Every distinct Stripe event: event_id, created, type, object_id, object_type, livemode."""
    rows = [(e.id, e.created * 1_000_000, e.type, e.object_id, e.object_type, e.livemode) for e in world.stripe_events]
    columns = ["event_id", "created", "type", "object_id", "object_type", "livemode"]
    return pl.DataFrame(rows, schema=columns, orient="row").with_columns(pl.col("created").cast(_MOMENT))


def object_states(world: World) -> pl.DataFrame:
    """The state in which each invoice, payment intent, charge, refund and dispute was last told, in the order of the world.

    Only the world knows that order: several events of an object share a second, and most name no previous values.
    """
    last: dict[str, tuple[str, str, str, int]] = {}
    for event in world.stripe_events:
        if event.livemode and event.object_type in STATES:
            body = event.data["object"]
            last[body["id"]] = (event.object_type, body["id"], body["status"], body[STATES[event.object_type]])
    columns = {"object_type": pl.String, "object_id": pl.String, "status": pl.String, "amount_minor": pl.Int64}
    return pl.DataFrame(list(last.values()), schema=columns, orient="row").sort("object_id")


def product_events(world: World) -> pl.DataFrame:
    """One row a unique valid product event, with the workspace that it counts for and the attribution it must get."""
    events = attributed(world.product_events, world.workspaces, world.timelines)
    resolved = pl.col("outcome") == RESOLVED
    users = pl.Series(world.product_records.user_ids, dtype=pl.String)
    return events.select(
        world.product_records.event_ids(events).alias("event_id"),
        (pl.col("occurred_at") * 1000).cast(_MOMENT),
        pl.Series([w.id for w in world.workspaces]).gather(events["workspace"]).alias("attributed_workspace_id"),
        pl.col("source").alias("workspace_source"),
        users.gather(events["identified"]).alias("identified_user_id"),
        "outcome",
        pl.when(resolved).then("customer_id").alias("stripe_customer_id"),
        *(pl.when(resolved).then(name).alias(name) for name in ("subscription_id", "plan", "billing_status")),
    )


def _with_moments(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns((pl.col("valid_from", "valid_to") * 1_000_000).cast(_MOMENT))


def counts(world: World) -> dict[str, Any]:
    """`truth.json`: what was sent and what of it is distinct, good and known."""
    usage = world.product_records.usage
    bad = Counter(usage.records["malformation"].to_list())
    events = world.stripe_events
    known = [e for e in events if e.livemode and e.object_type in KNOWN_OBJECTS]
    return {
        "config": world.config.to_json(),
        "start": world.start.isoformat(),
        "end": world.end.isoformat(),
        "product_events": {
            "sent": len(world.product_records),
            "received_until": datetime.fromtimestamp(int(world.product_records.received_at[-1]) / 1000, UTC).isoformat(),
            "unique": usage.events.height,
            "malformed": usage.records.height - bad[0],
            "duplicates": bad[0] - usage.events.height,
            "malformations": {MALFORMATIONS[kind]: number for kind, number in sorted(bad.items()) if kind},
        },
        "stripe_events": {
            "sent": len(world.stripe_deliveries),
            "unique": len({d.event_id for d in world.stripe_deliveries}),
            "unique_known": len(known),
            "known_objects": list(KNOWN_OBJECTS),
            "unique_test_mode": sum(not e.livemode for e in events),
            "by_type": dict(sorted(Counter(e.type for e in events).items())),
            "by_api_version": dict(sorted(Counter(e.api_version for e in events).items())),
        },
        "crm": {
            "changes": len(world.crm_changes),
            "membership_changes": len(world.membership_changes),
            "workspaces": len(world.workspaces),
            "unmapped": sum(not w.mapped for w in world.workspaces),
            "moves": sum(
                after is not None is not before for w in world.workspaces for (_, before), (_, after) in pairwise(w.owners)
            ),
            "shared": sum(any(owner is None for _, owner in w.owners) for w in world.workspaces),
            "deleted": sum(w.closed is not None for w in world.workspaces),
        },
        "subscriptions": len(world.histories),
        "customers": world.config.customers,
    }
