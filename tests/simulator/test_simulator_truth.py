"""The truth agrees with itself, and with what the payloads say when they are read in true order."""

import json
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from random import Random

import polars as pl
import pytest

from simulator.attribution import attributed
from simulator.catalogue import PLAN_RANK
from simulator.identity import IDENTIFY, LOOKBACK_MS, ONLY_DEVICE
from simulator.timeline import STATUS_CLASS, StateInterval, plan_timeline
from simulator.truth import KNOWN_OBJECTS, counts
from simulator.world import WorldConfig, build_world

TIMELINE = ["stripe_customer_id", "subscription_id", "plan", "price_id", "billing_status", "valid_from", "valid_to"]
HISTORY = [
    "subscription_id", "stripe_customer_id", "status", "billing_status", "price_id", "plan", "quantity",
    "cancel_at_period_end", "pause_collection", "valid_from", "valid_to",
]  # fmt: skip
EVENTS = [
    "event_id", "occurred_at", "attributed_workspace_id", "workspace_source", "identified_user_id", "outcome",
    "stripe_customer_id", "subscription_id", "plan", "billing_status",
]  # fmt: skip


@pytest.mark.parametrize(
    ("table", "columns", "key"),
    [("plan_timeline", TIMELINE, "stripe_customer_id"), ("subscription_history", HISTORY, "subscription_id")],
)
def test_intervals_have_no_gap_no_overlap_and_no_equal_neighbours(truth, table, columns, key):
    frame = pl.read_parquet(truth / f"{table}.parquet")
    assert frame.columns == columns
    assert frame.schema["valid_from"] == pl.Datetime("us", "UTC")
    for _, group in frame.group_by(key):
        rows = group.sort("valid_from").to_dicts()
        for before, after in pairwise(rows):
            assert before["valid_from"] < before["valid_to"] == after["valid_from"]
            assert [before[c] for c in columns[:-2]] != [after[c] for c in columns[:-2]]
        assert rows[-1]["valid_to"] is None


def _stays(subscription_id: str, status: str, plan: str, start: int) -> list[StateInterval]:
    return [StateInterval(subscription_id, "cus", status, status, f"price_{plan}", plan, 1, False, False, start, None)]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (("a", "active", "starter", 1), ("b", "trialing", "enterprise", 2)),
        (("a", "trialing", "starter", 1), ("b", "past_due", "enterprise", 2)),
        (("a", "past_due", "starter", 1), ("b", "unpaid", "enterprise", 2)),
        (("a", "unpaid", "starter", 1), ("b", "paused", "enterprise", 2)),
        (("a", "paused", "starter", 1), ("b", "incomplete", "enterprise", 2)),
        (("a", "incomplete", "starter", 1), ("b", "canceled", "enterprise", 2)),
        (("a", "active", "pro", 1), ("b", "active", "starter", 2)),
        (("a", "active", "pro", 2), ("b", "active", "pro", 1)),
        (("b", "active", "pro", 1), ("a", "active", "pro", 1)),
    ],
)
def test_the_subscription_in_force_is_the_best_by_status_plan_start_and_id(better, worse):
    assert plan_timeline([_stays(*better), _stays(*worse)])[-1].subscription_id == better[0]


def test_ended_subscriptions_stay_canceled(truth):
    history = pl.read_parquet(truth / "subscription_history.parquet")
    ended = history.filter(pl.col("status").is_in(["canceled", "incomplete_expired"]))
    assert ended.height > 20
    assert ended["valid_to"].is_null().all()
    assert (ended["billing_status"] == "canceled").all()


def _in_force(changes, at, row, value):
    """What the CRM's rows say at a time: each row its last version that took effect by then, unless that is a deletion."""
    last = {}
    for change in changes:
        if change.effective_at <= at and (row(change) not in last or last[row(change)].effective_at < change.effective_at):
            last[row(change)] = change
    return {value(change) for change in last.values() if not change.deleted}


def _oracle(world):
    """(event as sent, moment) -> attribution, from the events' payloads and the CRM's changes alone, by plain search."""
    states = defaultdict(lambda: defaultdict(list))
    for event in world.stripe_events:  # in true order
        obj = event.data["object"]
        if event.livemode and event.object_type == "subscription":
            status = "canceled" if obj["status"] == "incomplete_expired" else obj["status"]
            plan = obj["items"]["data"][0]["price"]["id"].split("_")[1]
            states[obj["customer"]][obj["id"]].append((event.created, status, plan))
    mappings, memberships = defaultdict(list), defaultdict(list)
    for change in world.crm_changes:
        mappings[change.workspace_id].append(change)
    for change in world.membership_changes:
        memberships[change.user_id].append(change)
    identified = defaultdict(list)
    for event, at in _valid(world).values():
        if event["event_name"] == "identify":
            identified[event["anonymous_id"]].append((at, event["user_id"]))

    def user_of(anonymous_id: str, at: datetime) -> str | None:
        said = sorted(identified[anonymous_id])
        before = [user for since, user in said if since <= at]
        soon = [user for since, user in said[:1] if since - timedelta(days=30) <= at]
        return before[-1] if before else soon[0] if soon else None

    def attribute(event: dict, at: datetime) -> tuple:
        workspaces, source, identified_user = {event.get("workspace_id")}, "sent", None
        if "workspace_id" not in event:
            identified_user = None if "user_id" in event else user_of(event["anonymous_id"], at)
            source = "membership" if "user_id" in event else "identity"
            known = memberships[event.get("user_id", identified_user)]
            workspaces = _in_force(known, at, lambda c: c.workspace_id, lambda c: c.workspace_id)
        if len(workspaces) != 1:
            outcome = "ambiguous" if workspaces else "unmapped_workspace"
            return (None, None, identified_user, outcome, None, None, None, None)
        (workspace,) = workspaces
        found = workspace, source, identified_user
        owners = _in_force(mappings[workspace], at, lambda c: c.mapping_id, lambda c: c.stripe_customer_id)
        if len(owners) != 1:
            return (*found, "ambiguous" if owners else "unmapped_workspace", None, None, None, None)
        (customer,) = owners
        running = []
        for subscription_id, versions in states[customer].items():
            upto = [v for v in versions if v[0] <= at.timestamp()]
            if upto:
                _, status, plan = upto[-1]
                standing = (-STATUS_CLASS.index(status), PLAN_RANK[plan], versions[0][0], subscription_id)
                running.append((standing, (customer, subscription_id, plan, status)))
        return (*found, "resolved", *max(running)[1]) if running else (*found, "no_subscription", None, None, None, None)

    return attribute


def _valid(world):
    """{event id: (event as sent, when)} of the records that are no malformed ones."""
    good = world.product_records.usage.records["malformation"] == 0
    payloads = [p for table in world.product_records.slices() for p in table["payload"].to_pylist()]
    events = [json.loads(p) for p, valid in zip(payloads, good, strict=True) if valid]
    return {e["event_id"]: (e, datetime.fromisoformat(e["occurred_at"])) for e in events}


def test_attribution_is_what_a_search_through_the_payloads_finds(world, truth):
    frame = pl.read_parquet(truth / "product_events.parquet")
    assert frame.columns == EVENTS
    attribute, sent = _oracle(world), _valid(world)
    rows = frame.rows()
    rare = [r for r in rows if r[5] != "resolved" or r[9] not in ("active", "trialing") or r[3] != "sent"]
    for event_id, occurred_at, *told in Random(1).sample(rows, 500) + rare:
        assert tuple(told) == attribute(sent[event_id][0], occurred_at), sent[event_id]
    assert set(frame["outcome"]) == {"resolved", "unmapped_workspace", "no_subscription", "ambiguous"}
    assert set(frame["workspace_source"]) == {"sent", "membership", "identity", None}


def test_identity_is_hard_in_every_way():
    """Users who moved, are between two workspaces or in two; devices known only later, never, or by two users."""
    world = build_world(WorldConfig(customers=100, product_events=60_000))
    events = attributed(world.product_events, world.workspaces, world.timelines)
    people = world.product_records.usage.people
    homes = [place for place, (start, end) in enumerate(pairwise(people.first_user)) for _ in range(start, end)]
    home = pl.Series(homes, dtype=pl.UInt32).gather(events["user"])
    assert events.filter((pl.col("source") == "membership") & (pl.col("workspace") != home)).height > 0
    assert events.filter("several").height > 0
    assert events.filter((pl.col("told") == ONLY_DEVICE) & pl.col("identified").is_null()).height > 0
    assert events.filter((pl.col("source") == "identity") & (pl.col("identified") != pl.col("user"))).height > 0
    first = events.filter(pl.col("told") == IDENTIFY).group_by("device").agg(pl.col("occurred_at").min().alias("first"))
    early = events.filter(pl.col("source") == "identity").join(first, on="device").filter(pl.col("occurred_at") < pl.col("first"))
    assert early.height > 10
    assert early.filter(pl.col("first") - pl.col("occurred_at") > LOOKBACK_MS).is_empty()
    shared = [place for place, w in enumerate(world.workspaces) if any(owner is None for _, owner in w.owners)]
    assert events.filter(pl.col("workspace").is_in(shared), pl.col("outcome") == "ambiguous").height > 10


def test_attribution_follows_moves_and_overlaps(world):
    moved = [w for w in world.workspaces if len(w.owners) > 1]
    assert any(w.entered > datetime.fromtimestamp(w.owners[-1][0], UTC) for w in moved)
    overlapping = 0
    for timeline in world.timelines.values():
        own = [h for h in world.histories.values() if h[0].stripe_customer_id == timeline[0].stripe_customer_id]
        spans = sorted((h[0].valid_from, h[-1].valid_from) for h in own if h[-1].status == "canceled")
        overlapping += any(a[1] > b[0] for a, b in pairwise(spans)) or len(own) > 1
        assert timeline[0].valid_from == min(h[0].valid_from for h in own)
    assert overlapping > 5


def test_last_states_are_those_that_the_books_rest_on(world, truth):
    """An invoice that was charged is paid, and what was refunded of a charge and did not fail is what it says."""
    states = {row["object_id"]: row for row in pl.read_parquet(truth / "object_states.parquet").to_dicts()}
    refunded = defaultdict(int)
    for money in world.money:
        if money.kind == "invoice_voided":
            assert states[money.object_id]["status"] == "void"
        if money.kind in ("refund", "refund_failed"):
            refunded[money.origin_id] -= money.amount
    charges = {i: s["amount_minor"] for i, s in states.items() if s["object_type"] == "charge" and s["amount_minor"]}
    assert charges == {i: amount for i, amount in refunded.items() if amount}
    assert len(charges) > 10


def test_counts_are_what_is_sent(world, truth):
    told = json.loads((truth / "truth.json").read_text())
    assert told["config"] == world.config.to_json()
    sent = pl.concat([pl.from_arrow(table) for table in world.product_records.slices()])
    product = told["product_events"]
    assert product["sent"] == sent.height == product["unique"] + product["duplicates"] + product["malformed"]
    assert product["unique"] == world.config.product_events
    ids = set(pl.read_parquet(truth / "product_events.parquet")["event_id"])
    assert len(ids) == product["unique"]
    texts = sent["payload"].to_list()
    prefix = {text[13:49].decode() for text in texts if text.startswith(b'{"event_id":"')}
    assert ids <= prefix
    bodies = {d.event_id: json.loads(d.body) for d in world.stripe_deliveries}
    stripe = told["stripe_events"]
    assert stripe["sent"] == len(world.stripe_deliveries)
    assert stripe["unique"] == len(bodies) == pl.read_parquet(truth / "stripe_events.parquet").height
    known = [b for b in bodies.values() if b["livemode"] and b["data"]["object"]["object"] in KNOWN_OBJECTS]
    assert stripe["unique_known"] == len(known)


@pytest.mark.parametrize("events", [1, 7, 1000])
def test_the_number_of_unique_events_is_exact(events):
    world = build_world(WorldConfig(seed=events, customers=100, days=20, product_events=events))
    assert counts(world)["product_events"]["unique"] == events
