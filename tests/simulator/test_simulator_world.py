"""The world is the same for the same seed, and its billing is one that Stripe could have sent."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest

from simulator.chance import mixed
from simulator.events import StripeEvent
from simulator.shapes import previous_attributes
from simulator.world import World, WorldConfig, build_world

DAY = 86_400
SMALL = WorldConfig(seed=3, customers=100, days=20, product_events=1_000)


def digest(world: World) -> str:
    seen = hashlib.sha256()
    for delivery in world.stripe_deliveries:
        seen.update(repr((delivery.deliver_at, delivery.event_id)).encode() + delivery.body)
    seen.update(repr((world.crm_changes, world.membership_changes)).encode())
    for table in world.product_records.slices():
        for name in ("received_at", "key", "payload"):
            seen.update(repr(pl.from_arrow(table)[name].to_list()).encode())
    return seen.hexdigest()


def test_the_same_seed_makes_the_same_world_in_any_process():
    script = "from test_simulator_world import *; print(digest(build_world(SMALL)))"
    here = Path(__file__).parent
    env = os.environ | {"PYTHONHASHSEED": "4", "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    elsewhere = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert elsewhere.stdout.strip() == digest(build_world(SMALL))


def test_another_seed_makes_another_world():
    assert len({digest(build_world(replace(SMALL, seed=seed))) for seed in (4, 5)}) == 2


def test_hashes_are_splitmix64():
    def splitmix64(n: int, salt: int) -> int:
        mask = (1 << 64) - 1
        z = (n * 0x9E3779B97F4A7C15 + salt) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    numbers = [0, 1, 2, 519_999, 2**40]
    got = pl.DataFrame({"n": numbers}).select(mixed(pl.col("n"), 2**63 + 11)).to_series().to_list()
    assert got == [splitmix64(n, 2**63 + 11) for n in numbers]


@pytest.mark.parametrize(
    "wrong",
    [{"start": datetime(2026, 1, 5)}, {"start": datetime(2026, 1, 5, 3, tzinfo=UTC)}, {"days": 0}],  # noqa: DTZ001
)
def test_a_config_that_makes_no_world_is_refused(wrong):
    with pytest.raises(ValueError):
        WorldConfig(**wrong)


# Deliveries


def test_every_event_is_delivered_before_the_end_and_in_order_of_delivery(world):
    at = [d.deliver_at for d in world.stripe_deliveries]
    assert at == sorted(at)
    assert at[-1] < world.end.timestamp()
    created = {e.id: e.created for e in world.stripe_events}
    assert {d.event_id for d in world.stripe_deliveries} == set(created)
    assert all(d.deliver_at > created[d.event_id] for d in world.stripe_deliveries)


def test_some_deliveries_are_repeated_late_and_out_of_order(world):
    count = Counter(d.event_id for d in world.stripe_deliveries)
    repeated = sum(n > 1 for n in count.values()) / len(count)
    assert 0.03 < repeated < 0.05
    assert set(count.values()) == {1, 2, 3, 4}
    created = {e.id: e.created for e in world.stripe_events}
    first = {}
    for delivery in world.stripe_deliveries:
        first.setdefault(delivery.event_id, delivery.deliver_at)
    wait = [at - created[event_id] for event_id, at in first.items()]
    assert 0.01 < sum(w > DAY - 1 for w in wait) / len(wait) < 0.03
    assert max(wait) <= 3 * DAY
    place = {e.id: number for number, e in enumerate(world.stripe_events)}
    order = [place[event_id] for event_id in first]
    assert sum(a > b for a, b in pairwise(order)) > len(order) / 4


def test_a_repeat_tells_the_same_and_may_differ_in_pending_webhooks(world):
    bodies = defaultdict(list)
    for delivery in world.stripe_deliveries:
        bodies[delivery.event_id].append(delivery.body)
    differing = 0
    for copies in bodies.values():
        envelopes = [json.loads(body) for body in copies]
        differing += len({e.pop("pending_webhooks") for e in envelopes}) > 1
        assert all(e == envelopes[0] for e in envelopes)
    assert differing > 10


# Events


def test_events_are_rendered_at_the_version_of_their_time(world):
    middle = world.start.timestamp() + world.config.days * DAY / 2
    for event in world.stripe_events:
        assert event.api_version == ("2024-06-20" if event.created < middle else "2025-03-31.basil")


def _by_object(world: World, object_type: str) -> Iterator[list[StripeEvent]]:
    found = defaultdict(list)
    for event in world.stripe_events:
        if event.object_type == object_type:
            found[event.object_id].append(event)
    yield from found.values()


def _restored(obj: dict, previous: dict) -> dict:
    """The object before an update, from `previous_attributes`."""
    before = dict(obj)
    for key, old in previous.items():
        both = isinstance(old, dict) and isinstance(obj.get(key), dict)
        before[key] = _restored(obj[key], old) if both else old
    return before


def _without_nulls(value):
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return value


@pytest.mark.parametrize("object_type", ["subscription", "customer"])
def test_previous_attributes_lead_from_each_event_to_the_one_before(world, object_type):
    links = 0
    for events in _by_object(world, object_type):
        for before, after in pairwise(events):
            if before.api_version != after.api_version or after.type == "customer.subscription.deleted":
                continue
            earlier = _restored(after.data["object"], after.data.get("previous_attributes", {}))
            expected = dict(before.data["object"])
            for obj in (earlier, expected):
                obj.pop("next_invoice_sequence", None)  # Stripe counts it up without an event
            assert _without_nulls(earlier) == _without_nulls(expected), (before.type, after.type)
            links += 1
    assert links > 100


def test_previous_attributes_hold_only_what_changed():
    old = {"a": 1, "b": {"c": 1, "d": [1]}, "e": None, "same": {"x": 1}}
    new = {"a": 2, "b": {"c": 1, "d": [2], "f": 3}, "e": {"g": 1}, "same": {"x": 1}}
    assert previous_attributes(old, new) == {"a": 1, "b": {"d": [1], "f": None}, "e": None}


def test_one_second_holds_several_updates_whose_ids_reverse_the_truth(world):
    chains = Counter()
    for events in _by_object(world, "subscription"):
        seconds = defaultdict(list)
        for event in events:
            seconds[event.created].append(event)
        for group in seconds.values():
            if len(group) > 1:
                ids = [e.id for e in group]
                assert ids == sorted(ids, reverse=True)
                chains[tuple(e.data["object"]["status"] for e in group if e.type.endswith(".updated"))] += 1
    assert chains["past_due", "active"] >= 5  # active -> past_due -> active
    assert sum(n for chain, n in chains.items() if len(chain) == 3) >= 3


def test_the_lives_show_every_status_and_kind_of_event(world):
    statuses = {i.status for history in world.histories.values() for i in history}
    assert statuses == {
        "trialing", "active", "incomplete", "incomplete_expired", "past_due", "unpaid", "paused", "canceled",
    }  # fmt: skip
    types = Counter(e.type for e in world.stripe_events)
    for kind in (
        "customer.deleted", "customer.subscription.paused", "customer.subscription.resumed", "invoice.voided",
        "invoice.marked_uncollectible", "charge.failed", "refund.failed", "charge.dispute.funds_reinstated",
        "radar.early_fraud_warning.created", "billing.capacity_reservation.renewed", "balance.available",
    ):  # fmt: skip
        assert types[kind] > 0, kind
    history = [i for h in world.histories.values() for i in h]
    assert any(i.pause_collection and i.status == "active" for i in history)
    assert any(i.cancel_at_period_end for i in history)
    assert {i.price_id.split("_")[2] for i in history} == {"month", "year"}
    assert any(not e.livemode for e in world.stripe_events)


def test_nothing_happens_to_billing_after_its_days(world):
    horizon = world.start.timestamp() + world.config.days * DAY
    assert max(e.created for e in world.stripe_events) < horizon
    assert max(i.valid_from for h in world.histories.values() for i in h) < horizon


# Money


def _objects(world: World, object_type: str) -> dict[str, dict]:
    """The last state of each live object."""
    return {e.object_id: e.data["object"] for e in world.stripe_events if e.object_type == object_type and e.livemode}


def test_invoices_add_up(world):
    for event in world.stripe_events:
        if event.object_type == "invoice":
            invoice = event.data["object"]
            assert sum(line["amount"] for line in invoice["lines"]["data"]) == invoice["total"] == invoice["amount_due"]
            assert invoice["amount_paid"] + invoice["amount_remaining"] == invoice["total"] >= 0
            assert (invoice["status"] == "paid") == (invoice["status_transitions"]["paid_at"] is not None)


def test_ids_join_in_both_versions(world):
    invoices, charges, intents = (_objects(world, name) for name in ("invoice", "charge", "payment_intent"))
    subscriptions, customers = _objects(world, "subscription"), _objects(world, "customer")
    paid_by = {p["payment"]["payment_intent"]: p["invoice"] for p in _objects(world, "invoice_payment").values()}
    for event in world.stripe_events:
        if not event.livemode:
            continue
        obj, old = event.data["object"], event.api_version == "2024-06-20"
        match event.object_type:
            case "subscription":
                assert obj["customer"] in customers
                assert obj["latest_invoice"] in invoices
            case "invoice":
                parent = obj["subscription"] if old else obj["parent"]["subscription_details"]["subscription"]
                assert parent in subscriptions
            case "charge":
                assert obj["payment_intent"] in intents
                invoice = obj["invoice"] if old else paid_by.get(obj["payment_intent"], obj["payment_intent"])
                assert invoice in invoices or obj["status"] == "failed" or obj["created"] < event.created
            case "refund" | "dispute":
                assert obj["payment_intent"] == charges[obj["charge"]]["payment_intent"]


def test_refunds_and_disputes_account_for_their_charge(world):
    charges, refunds = _objects(world, "charge"), _objects(world, "refund")
    refunded = Counter()
    for refund in refunds.values():
        refunded[refund["charge"]] += refund["amount"] if refund["status"] == "succeeded" else 0
    assert len(refunds) > 10
    for charge_id, amount in refunded.items():
        assert charges[charge_id]["amount_refunded"] == amount <= charges[charge_id]["amount"]
    closed = {d["status"] for d in _objects(world, "dispute").values()}
    assert closed >= {"won", "lost"}
    for dispute in _objects(world, "dispute").values():
        moved = sum(t["amount"] for t in dispute["balance_transactions"])
        inquiry = dispute["status"].startswith("warning")
        assert moved == (0 if inquiry or dispute["status"] == "won" else -dispute["amount"])


# CRM


def test_the_crm_learns_late_and_never_twice_within_days(world):
    changes = world.crm_changes
    assert changes == sorted(changes, key=lambda c: (c.visible_at, c.workspace_id))
    assert all(c.effective_at < c.visible_at < world.end for c in changes)
    late = sum((c.visible_at - c.effective_at).total_seconds() >= 3600 for c in changes) / len(changes)
    assert 0.08 < late < 0.22
    by_workspace = defaultdict(list)
    for change in changes:
        by_workspace[change.workspace_id].append(change)
    for own in by_workspace.values():
        for before, after in pairwise(own):
            assert after.mapping_id in (before.mapping_id, "map_2") or after.deleted
            assert (after.visible_at - before.visible_at).total_seconds() >= 5 * DAY
            assert after.effective_at > before.effective_at
    assert sum(len({c.stripe_customer_id for c in own}) > 1 for own in by_workspace.values()) >= 4
    assert any(c.deleted for c in changes)
    assert {w.id for w in world.workspaces if w.mapped} == set(by_workspace)
    assert sum(not w.mapped for w in world.workspaces) >= 2


def test_the_crm_names_two_customers_of_some_workspaces_for_some_days(world):
    rows = defaultdict(dict)
    for change in world.crm_changes:
        rows[change.workspace_id].setdefault(change.mapping_id, []).append(change)
    several = [mappings for mappings in rows.values() if len(mappings) > 1]
    assert len(several) >= 2
    for first, second in (mappings.values() for mappings in several):
        assert first[0].stripe_customer_id != second[0].stripe_customer_id
        ends = [c for c in (*first, *second) if c.deleted]
        assert len(ends) <= 1
        assert all(c.effective_at > second[0].effective_at for c in ends)
    ended = {c.mapping_id for mappings in several for row in mappings.values() for c in row if c.deleted}
    assert "map_1" in ended


def test_every_user_belongs_to_the_workspace_it_works_in_and_a_few_are_guests_of_another(world):
    """So that the workspace of an event can be told from its user, except while that one is a guest elsewhere or between two."""
    changes = world.membership_changes
    assert changes == sorted(changes, key=lambda c: (c.visible_at, c.user_id, c.workspace_id))
    assert all(c.effective_at < c.visible_at < world.end for c in changes)
    late = sum((c.visible_at - c.effective_at).total_seconds() >= 3600 for c in changes) / len(changes)
    assert 0.08 < late < 0.22
    created = {w.id: w.created for w in world.workspaces}
    began, ended = defaultdict(dict), defaultdict(dict)
    for change in sorted(changes, key=lambda c: c.effective_at):
        (ended if change.deleted else began)[change.user_id][change.workspace_id] = change
    for user, there in began.items():
        home, *away = there.values()
        assert home.effective_at.timestamp() == created[home.workspace_id]
        for other in away:
            end = ended[user].get(home.workspace_id)
            assert (other.role == "guest") == (end is None)
            assert end is None or end.effective_at <= other.effective_at
    kinds = Counter(c.role == "guest" for there in began.values() for c in list(there.values())[1:])
    assert 0.01 < kinds[True] / len(began) < 0.04
    assert 0.01 < kinds[False] / len(began) < 0.05
    events = [json.loads(p) for t in world.product_records.slices(rows=2_000) for p in t["payload"].to_pylist()[:200] if _good(p)]
    assert len(events) > 500
    for event in events:
        at, said = datetime.fromisoformat(event["occurred_at"]), began[event["user_id"]][event["workspace_id"]]
        assert said.role != "guest"
        assert said.effective_at <= at
        end = ended[event["user_id"]].get(event["workspace_id"])
        assert end is None or at < end.effective_at


def _good(payload):
    """Whether it names a workspace and a user, and is no malformed record."""
    try:
        event = json.loads(payload)
        return (
            isinstance(event["workspace_id"], str)
            and bool(event["user_id"])
            and datetime.fromisoformat(event["occurred_at"]).tzinfo
        )
    except (ValueError, LookupError, TypeError):
        return False
