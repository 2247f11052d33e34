"""Bodies are what Stripe and a product really send: shapes, sizes, lateness, duplicates, malformed records."""

import json
import re
from collections import Counter, defaultdict
from datetime import datetime

import polars as pl
import pyarrow as pa
import pytest
from stripe_keys import ENVELOPE, ITEM_KEYS, ITEM_LINE_KEYS, KEYS, LINE_KEYS, keys

from simulator.catalogue import UPGRADE_SIGNALS
from simulator.usage import MALFORMATIONS, _arrive, _arrive_again, upgrades
from simulator.world import World

HOURS_72_MS = 72 * 3_600_000
PRODUCT_KEYS = keys(
    """event_id event_name schema_version occurred_at sent_at workspace_id user_id anonymous_id session_id feature platform
    app_version country ip user_agent properties context"""
)
NOT_ALWAYS = {"workspace_id", "user_id", "feature"}


def test_stripe_bodies_have_the_keys_of_real_ones(world):
    seen = set()
    for delivery in world.stripe_deliveries:
        envelope = json.loads(delivery.body)
        assert set(envelope) == ENVELOPE
        assert re.fullmatch(r"evt_[0-9A-Za-z]{24}", envelope["id"])
        assert envelope["id"] == delivery.event_id
        obj, version = envelope["data"]["object"], envelope["api_version"]
        expected = KEYS[version].get(obj["object"])
        if expected is None:
            continue
        if obj["object"] == "refund":
            obj = {k: v for k, v in obj.items() if not k.startswith("failure_")}
        assert set(obj) == expected, (version, obj["object"], set(obj) ^ expected)
        seen.add((version, obj["object"]))
        if obj["object"] == "subscription":
            assert set(obj["items"]["data"][0]) == ITEM_KEYS[version]
        if obj["object"] == "invoice":
            lines = ITEM_LINE_KEYS if obj["billing_reason"] == "manual" else LINE_KEYS
            assert all(set(line) == lines[version] for line in obj["lines"]["data"])
    assert seen >= {(version, name) for version in KEYS for name in ("subscription", "invoice", "charge", "payment_intent")}


@pytest.fixture(scope="module")
def records(world: World) -> pl.DataFrame:
    return pl.concat([pl.from_arrow(table) for table in world.product_records.slices(rows=3_000)])


@pytest.fixture(scope="module")
def good(records: pl.DataFrame) -> list[tuple[int, bytes, dict]]:
    """(received_at, key, event) of the records that a strict reader takes."""
    found = []
    for received_at, key, payload in records.iter_rows():
        event = strictly(payload, received_at)
        if event is not None:
            found.append((received_at, key, event))
    return found


def strictly(payload: bytes, received_at: int) -> dict | None:
    try:
        event = json.loads(payload)
        occurred = datetime.fromisoformat(event["occurred_at"])
        age = received_at - occurred.timestamp() * 1000
        valid = (
            occurred.tzinfo is not None and -600_000 < age < 30 * 86_400_000 and isinstance(event.get("workspace_id", ""), str)
        )
        return event if valid and event["event_id"] else None
    except (ValueError, KeyError, TypeError):
        return None


def test_product_records_are_sorted_and_sliced_without_loss(world, records):
    assert records.columns == ["received_at", "key", "payload"]
    assert records["received_at"].is_sorted()
    assert records.height == len(world.product_records)
    middle = records["received_at"][records.height // 2]
    halves = [*world.product_records.slices(None, middle), *world.product_records.slices(middle, None)]
    again = pl.concat([pl.from_arrow(table) for table in halves])
    assert again.equals(records)
    start, end = (edge.timestamp() * 1000 for edge in (world.start, world.end))
    assert start <= records["received_at"][0]
    assert records["received_at"][-1] < end


def test_product_payloads_are_complete_and_as_large_as_real_ones(records, good):
    assert 730 < records["payload"].bin.size().mean() < 830
    extra, said = Counter(), Counter()
    for _, key, event in good:
        assert set(event) >= PRODUCT_KEYS - NOT_ALWAYS
        extra.update(set(event) - PRODUCT_KEYS)
        assert event.get("workspace_id", event["anonymous_id"]).encode() == key
        said[tuple(sorted(NOT_ALWAYS & set(event))), event["event_name"] == "identify"] += 1
        assert event["occurred_at"] <= event["sent_at"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["occurred_at"])
    assert set(extra) == {"experiment", "referrer"}
    assert 0.005 < extra.total() / len(good) < 0.02
    shares = {what: round(number / len(good), 2) for what, number in said.items()}
    assert shares == {
        (("feature", "user_id", "workspace_id"), False): 0.92,
        (("feature", "user_id"), False): 0.04,
        (("feature",), False): 0.03,
        (("user_id",), True): 0.01,
    }


def test_product_payloads_do_not_compress_away(records):
    raw = b"".join(records["payload"].to_list())
    assert len(raw) / len(pa.Codec("zstd", compression_level=1).compress(raw)) < 8


def test_product_events_are_late_and_doubled_as_said(good):
    copies = defaultdict(list)
    late = 0
    for received_at, _, event in good:
        wait = received_at - round(datetime.fromisoformat(event["occurred_at"]).timestamp() * 1000)
        assert 200 <= wait <= HOURS_72_MS
        if event["event_id"] not in copies:
            late += wait > 20_000
        copies[event["event_id"]].append(event)
    assert 0.08 < late / len(copies) < 0.12
    assert 0.04 < (len(good) - len(copies)) / len(copies) < 0.06
    resent = 0
    for first, *others in copies.values():
        for other in others:
            resent += other["sent_at"] > first["sent_at"]
            assert {**other, "sent_at": ""} == {**first, "sent_at": ""}
    assert resent > 20


def test_nothing_is_received_more_than_72_hours_late():
    numbers = pl.int_range(300_000, eager=True, dtype=pl.UInt32)
    columns = dict.fromkeys(("occurred_at", "workspace", "device", "user", "told", "feature", "name", "malformation"), 0)
    drawn = pl.DataFrame({"event_no": numbers}).with_columns(**{name: pl.lit(zero) for name, zero in columns.items()})
    arrived = _arrive(drawn, seed=1)
    for received in (arrived["received_at"], _arrive_again(arrived, seed=1)["received_at"]):
        assert 0.9 * HOURS_72_MS < received.max() < HOURS_72_MS


def test_each_kind_of_malformed_record_is_refused_by_a_strict_reader(world, records, good):
    kinds = world.product_records.usage.records["malformation"]
    assert records.height - len(good) == (kinds > 0).sum() >= len(MALFORMATIONS) - 1
    for (received_at, _, payload), kind in zip(records.iter_rows(), kinds, strict=True):
        assert (strictly(payload, received_at) is None) == (kind > 0), MALFORMATIONS[kind]


def test_upgrades_follow_attempts_at_what_the_next_plan_sells(world, good):
    owner = {w.id: w.owners[0][1] for w in world.workspaces if len(w.owners) == 1}
    first_upgrade = {customer: upgrades(timeline)[0] for customer, timeline in world.timelines.items() if upgrades(timeline)}
    counted = Counter()  # (within the week before the upgrade, an attempt at what is sold by the next plan)
    for _, _, event in good:
        upgraded_at, plan = first_upgrade.get(owner.get(event.get("workspace_id")), (0, ""))
        at = datetime.fromisoformat(event["occurred_at"]).timestamp()
        if at < upgraded_at and "feature" in event:
            attempt = event["event_name"] == "feature_attempted" and event["feature"] in UPGRADE_SIGNALS[plan]
            counted[at >= upgraded_at - 7 * 86_400, attempt] += 1
    lift = counted[True, True] / (counted[True, True] + counted[True, False])
    usual = counted[False, True] / (counted[False, True] + counted[False, False])
    assert lift > 5 * usual, counted
