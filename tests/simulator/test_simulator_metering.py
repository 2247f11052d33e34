"""What is billed by use: metered as the payloads say, invoiced by the month, and not all of it."""

import json
from collections import Counter, defaultdict
from datetime import UTC, datetime

import pytest

from simulator.catalogue import METRICS, PRODUCTS
from simulator.metering import by_month
from simulator.world import World

PRODUCT = {f"prod_streamforge_{metric.product}": metric for metric in METRICS}


@pytest.fixture(scope="module")
def used(world: World) -> dict[tuple, int]:
    return {(r["customer_id"], r["metric"], r["month"]): r["quantity"] for r in by_month(world.metered).to_dicts()}


@pytest.fixture(scope="module")
def lines(world: World) -> dict[str, list[dict]]:
    """The metered lines of each invoice, as it was last told."""
    last = {e.object_id: e.data["object"] for e in world.stripe_events if e.object_type == "invoice"}
    return {
        i: metered
        for i, invoice in last.items()
        if (metered := [line | {"of": invoice} for line in invoice["lines"]["data"] if _product(line) in PRODUCT])
    }


def _product(line: dict) -> str:
    return line["price"]["product"] if "price" in line else line["pricing"]["price_details"]["product"]


def _quantities(lines: dict[str, list[dict]]) -> dict[tuple, int]:
    return {
        (line["of"]["customer"], PRODUCT[_product(line)].name, _month(line["period"]["start"])): line["quantity"]
        for metered in lines.values()
        for line in metered
    }


def _month(seconds: int):
    return datetime.fromtimestamp(seconds, UTC).date()


def test_use_is_what_the_payloads_add_up_to(world, used):
    ids = world.product_records.event_ids(world.product_events)
    places = dict(zip(ids, world.product_events["workspace"], strict=True))  # test_simulator_truth.py searches for these
    owners = {w.id: w.owners for w in world.workspaces if w.mapped}
    events = {}
    for table in world.product_records.slices():
        for payload in table["payload"].to_pylist():
            try:
                event = json.loads(payload)
                events[event["event_id"]] = event, datetime.fromisoformat(event["occurred_at"])
            except (ValueError, LookupError, TypeError):
                continue
    good = set(world.product_records.event_ids(world.product_records.usage.events))
    amounts, count = Counter(), Counter()
    for event_id in good:
        event, at = events[event_id]
        metric = next((m for m in METRICS if m.event_name == event["event_name"]), None)
        workspace = None if places[event_id] is None else world.workspaces[places[event_id]].id
        assert workspace == event.get("workspace_id", workspace)
        if metric is None or workspace not in owners:
            continue
        owner = [owner for since, owner in owners[workspace] if since <= at.timestamp()][-1]
        if owner is None:
            continue
        key = owner, metric.name, at.date().replace(day=1)
        amounts[key] += event["properties"][metric.measure]
        count[key] += 1
    per_unit = {metric.name: metric.per_unit for metric in METRICS}
    assert used == {key: amount // per_unit[key[1]] for key, amount in amounts.items()}
    told = {(r["customer_id"], r["metric"], r["month"]): r["events"] for r in by_month(world.metered).to_dicts()}
    assert told == count


def test_the_invoices_say_what_was_billed(world, lines):
    bills = {(b.customer_id, b.metric, b.month): b.quantity for b in world.usage_bills}
    assert _quantities(lines) == bills
    assert len(bills) == len(world.usage_bills)
    for metered in lines.values():
        invoice = metered[0]["of"]
        assert sum(line["amount"] for line in metered) == invoice["total"]
        assert invoice["collection_method"] == "send_invoice"
        assert invoice["due_date"] == invoice["status_transitions"]["finalized_at"] + 30 * 86_400
        for line in metered:
            metric = PRODUCT[_product(line)]
            assert line["amount"] == line["quantity"] * metric.unit_minor
            # a bill comes within three days of the end of its month
            assert 0 < invoice["created"] - line["period"]["end"] < 3 * 86_400
            assert _month(line["period"]["end"]).day == _month(line["period"]["start"]).day == 1


def test_some_use_is_never_billed_and_some_is_billed_twice(world, used, lines):
    last = max(_quantities(lines), key=lambda key: key[2])[2]
    billed = {key: _quantities(lines).get(key, 0) for key in used if key[2] <= last}
    wrong = defaultdict(int)
    for key, quantity in billed.items():
        kind = "all" if quantity == used[key] else "none" if not quantity else "part" if quantity < used[key] else "twice"
        wrong[kind] += 1
        assert kind != "twice" or quantity == 2 * used[key]
    assert min(wrong[kind] for kind in ("none", "part", "twice")) > 0
    assert wrong["all"] > len(billed) / 2
    # who has no subscription in good standing any more is not billed
    reasons = {i.billing_status for (c, _, m), q in billed.items() if not q for i in world.timelines.get(c, ())}
    assert reasons & {"canceled", "unpaid"}


def test_what_is_billed_by_use_is_sold(world):
    told = {e.object_id for e in world.stripe_events if e.object_type == "product"}
    assert set(PRODUCT) < told == {product.id for product in PRODUCTS}
    prices = {e.object_id: e.data["object"] for e in world.stripe_events if e.object_type == "price"}
    for metric in METRICS:
        for currency in ("usd", "eur"):
            price = prices[f"price_{metric.product}_{currency}"]
            assert (price["type"], price["recurring"], price["unit_amount"]) == ("one_time", None, metric.unit_minor)
