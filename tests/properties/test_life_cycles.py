"""Two to four events of an object in one second, without previous values: the life cycle says which state is the last."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pytest

from lakehouse.declarations import load_reference
from lakehouse.settings import ROOT
from transforms.life_cycles import progress_of
from transforms.pure import billing_tables, deliveries
from transforms.stripe_shapes import shapes

CYCLES = load_reference(ROOT / "catalog", "life_cycles")
SHAPES = shapes(load_reference(ROOT / "catalog", "stripe_objects"))
LIVES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "invoice": [
        ("invoice.created", {"status": "draft"}),
        ("invoice.finalized", {"status": "open"}),
        ("invoice.payment_failed", {"status": "open", "attempt_count": 1}),
        ("invoice.paid", {"status": "paid", "attempt_count": 1}),
    ],
    "payment_intent": [
        ("payment_intent.created", {"status": "requires_payment_method"}),
        ("payment_intent.requires_action", {"status": "requires_action"}),
        ("payment_intent.processing", {"status": "processing"}),
        ("payment_intent.succeeded", {"status": "succeeded"}),
    ],
    "charge": [
        ("charge.pending", {"status": "pending", "amount_refunded": 0}),
        ("charge.succeeded", {"status": "succeeded", "amount_refunded": 0}),
        ("charge.refunded", {"status": "succeeded", "amount_refunded": 100}),
        ("charge.refunded", {"status": "succeeded", "amount_refunded": 900}),
    ],
    "refund": [
        ("refund.created", {"status": "requires_action"}),
        ("refund.updated", {"status": "pending"}),
        ("refund.updated", {"status": "succeeded"}),
        ("refund.failed", {"status": "failed"}),
    ],
    "dispute": [
        ("charge.dispute.created", {"status": "warning_needs_response"}),
        ("charge.dispute.updated", {"status": "needs_response"}),
        ("charge.dispute.updated", {"status": "under_review"}),
        ("charge.dispute.closed", {"status": "lost"}),
    ],
}
TABLES = {
    "invoice": "invoices",
    "payment_intent": "payment_intents",
    "charge": "charges",
    "refund": "refunds",
    "dispute": "disputes",
}
AT = datetime(2026, 1, 1, tzinfo=UTC)


def bodies() -> tuple[list[bytes], dict[tuple[str, str], dict[str, Any]]]:
    """Every choice of two to four steps of each life, under every order of event ids; and the last state of each such object."""
    found, last = [], {}
    for kind, life in LIVES.items():
        for size in (2, 3, 4):
            for steps in itertools.combinations(life, size):
                for number, ids in enumerate(itertools.permutations(range(size))):
                    name = f"{kind}_{size}_{'_'.join(str(life.index(s)) for s in steps)}_{number}"
                    last[kind, name] = steps[-1][1]
                    for (event_type, body), n in zip(steps, ids, strict=True):
                        event = {"id": f"evt_{name}_{n}", "object": "event", "type": event_type, "created": int(AT.timestamp())}
                        data = {"object": {"id": name, "object": kind, "customer": "cus_1", "currency": "usd", **body}}
                        found.append(json.dumps(event | {"livemode": True, "data": data}).encode())
    return found, last


@pytest.mark.parametrize("reverse", [False, True])
def test_the_last_state_is_that_of_the_life_cycle(reverse: bool) -> None:
    sent, last = bodies()
    tables = billing_tables(deliveries([(body, AT) for body in (sent[::-1] if reverse else sent)]))
    heads = {r["object_id"]: json.loads(r["state"]) for r in tables["billing.object_heads"].to_pylist()}
    for kind, table in TABLES.items():
        rows = pl.DataFrame(tables[f"billing.{table}"])
        found = {r[f"{kind}_id"]: r for r in rows.iter_rows(named=True)}
        wanted = {name: body for (k, name), body in last.items() if k == kind}
        assert found.keys() == wanted.keys()
        for name, body in wanted.items():
            for column, value in body.items():
                stored = "amount_refunded_minor" if column == "amount_refunded" else column
                assert found[name][stored] == heads[name][stored] == value, name


def test_the_life_cycles_speak_of_columns_and_types_that_there_are() -> None:
    for kind, cycle in CYCLES.items():
        assert set(cycle) <= {"states", "events"}, kind
        assert set(cycle.get("states", {})) <= {*SHAPES[kind]["columns"], *SHAPES[kind].get("lists", {})}, kind
        assert all(isinstance(rule, dict) or rule == "grows" for rule in cycle.get("states", {}).values()), kind
        assert len(set(cycle.get("events", ()))) == len(cycle.get("events", ())), kind


def test_an_object_as_fetched_comes_after_what_happened_in_its_second() -> None:
    progress = progress_of(CYCLES)
    paid = {"status": "paid"}
    events = ("invoice.something_new", "invoice.updated", "invoice.paid", "invoice.snapshot")
    places = [progress({"object_type": "invoice", "event_type": e}, paid) for e in events]
    assert places == sorted(set(places))
    assert progress({"object_type": "customer", "event_type": "customer.updated"}, {}) == (0,)
