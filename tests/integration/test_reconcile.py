"""Reconciliation against the Stripe-shaped API over real HTTP: what it finds, what it repairs, and what it lives through."""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

import writers.stripe_api
from lakehouse.drift import TABLE as DRIFT
from lakehouse.errors import Fenced, Retryable, Terminal, UsageError
from lakehouse.runner import run
from simulator.api import Faults
from tests.feed import rows
from tests.reconciling import DAY, LIVE, NOW, TEST, Bench, as_webhook, bench, customer, event, feed
from writers.reconcile import reconcile
from writers.stripe_api import StripeReader

HOUR = 3_600
OPEN = f"SELECT object_type, object_id, field, state, ours, theirs FROM {DRIFT} WHERE resolved_at IS NULL ORDER BY ALL"
# 250 changes of one customer over the last 25 days: three pages
MANY = [event(i, NOW - 25 * DAY + i * 2 * HOUR, customer(name=f"N{i}"), id=f"evt_{i:03}") for i in range(250)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers.stripe_api, "FIRST_WAIT_SECONDS", 0.01)


def name_of(b: Bench, customer_id: str = "cus_1") -> Any:
    run(b.lake(), ["billing.object_heads", "billing.customers"])
    found = rows(b.lake(), f"SELECT name FROM billing.customers WHERE customer_id = '{customer_id}'")
    return found[0]["name"] if found else None


# --- events ------------------------------------------------------------------------------------------------------------


def test_events_that_never_arrived_are_found_sent_and_closed(tmp_path: Path) -> None:
    with bench(tmp_path, MANY, withheld={"evt_003", "evt_100", "evt_249"}) as b:
        first = b.reconcile()
        assert (first.events.listed, first.events.missing, first.events.sent) == (250, 3, 3)
        assert (first.open, first.resolved, first.lasting) == (3, 0, 0)
        assert rows(b.lake(), OPEN)[0] == {
            "object_type": "event",
            "object_id": "evt_003",
            "field": "*",
            "state": "missing",
            "ours": None,
            "theirs": '{"type":"customer.updated","object":"cus_1"}',
        }
        sent = {r.value: dict(r.headers) for r in b.topic.records}
        assert {headers["source"] for headers in sent.values()} == {b"events_api"}
        assert {json.loads(body)["id"] for body in sent} == {"evt_003", "evt_100", "evt_249"}
        b.ingest()
        second = b.reconcile()
        assert (second.events.missing, second.open, second.resolved) == (0, 0, 3)
        assert [r["n"] for r in rows(b.lake(), "SELECT count(*) AS n FROM billing.event_versions GROUP BY event_id")] == [1] * 250
        assert name_of(b) == "N249"


def test_a_run_goes_on_from_where_the_last_one_ended(tmp_path: Path) -> None:
    clock = [float(NOW - 5 * DAY)]
    with bench(tmp_path, MANY, withheld={"evt_248"}, clock=lambda: clock[0]) as b:
        assert b.reconcile().events.listed == 240
        clock[0] = NOW
        again = b.reconcile()
        assert again.events.listed < 80
        assert again.events.missing == 1


def test_what_was_sent_and_not_taken_up_is_sent_again_and_called_lasting(tmp_path: Path) -> None:
    with bench(tmp_path, MANY, withheld={"evt_003"}) as b:
        b.reconcile()
        b.topic.records.clear()  # the topic lost it
        again = b.reconcile()
        assert (again.events.sent, again.open, again.lasting) == (1, 1, 1)
        assert len(rows(b.lake(), f"SELECT * FROM {DRIFT}")) == 1
        b.ingest()
        assert b.reconcile().open == 0


def test_a_dry_run_tells_and_leaves_no_trace(tmp_path: Path) -> None:
    with bench(tmp_path, MANY, withheld={"evt_003"}) as b:
        told = b.reconcile("customer", dry_run=True)
        assert told.differences == 1
        assert (told.events.missing, told.events.sent, told.open) == (1, 0, 0)
        assert b.topic.records == []
        assert rows(b.lake(), f"SELECT * FROM {DRIFT}") == []
        assert b.reconcile().events.listed == 250


def test_an_event_that_appears_while_the_list_is_read_shifts_nothing(tmp_path: Path) -> None:
    """The list is newest first: what comes on top would push the pages down if they were counted."""
    clock = [float(NOW)]
    live = [*MANY, event(900, NOW + 60, customer(name="new"), id="evt_new")]

    def later(path: str) -> None:
        clock[0] += 120

    with bench(tmp_path, live, withheld={"evt_new", *(f"evt_{i:03}" for i in range(0, 250, 7))}, clock=lambda: clock[0]) as b:
        b.before.append(later)
        report = b.reconcile(since=datetime.fromtimestamp(NOW - 29 * DAY, UTC))
        assert report.events.missing == 36
        assert "evt_new" not in {r["object_id"] for r in rows(b.lake(), OPEN)}  # too young to be missed


def test_a_young_event_is_not_missed_yet(tmp_path: Path) -> None:
    events = [event(1, NOW - HOUR, customer()), event(2, NOW - 60, customer(name="B"))]
    with bench(tmp_path, events, withheld={"evt_2"}) as b:
        assert b.reconcile().events.missing == 0


def test_only_30_days_can_be_listed_and_a_gap_is_told(tmp_path: Path) -> None:
    clock = [float(NOW - 60 * DAY)]
    events = [
        event(1, NOW - 70 * DAY, customer()),
        event(2, NOW - 45 * DAY, customer(name="B")),
        event(3, NOW - DAY, customer(name="C")),
    ]
    with bench(tmp_path, events, withheld={"evt_2", "evt_3"}, clock=lambda: clock[0]) as b:
        assert b.reconcile().events.unreachable_from is None
        clock[0] = NOW
        report = b.reconcile()
        assert report.events.unreachable_from is not None
        assert {r["object_id"] for r in rows(b.lake(), OPEN)} == {"evt_3"}


def test_a_later_since_does_not_jump_over_what_was_never_compared(tmp_path: Path) -> None:
    with bench(tmp_path, MANY, withheld={"evt_003", "evt_240"}) as b:
        assert b.reconcile(since=datetime.fromtimestamp(NOW - 7 * DAY, UTC)).events.missing == 1
        assert b.reconcile().events.missing == 2  # the one of before was not taken up yet


def test_an_event_that_stripe_does_not_know_is_told(tmp_path: Path) -> None:
    with bench(tmp_path, MANY) as b:
        feed(b.lake(), [as_webhook(event(1, NOW - DAY, customer("cus_9"), id="evt_forged"))])
        report = b.reconcile()
        assert (report.events.extra, report.events.sent) == (1, 0)
        assert [(r["object_id"], r["state"]) for r in rows(b.lake(), OPEN)] == [("evt_forged", "extra")]
        assert rows(b.lake(), f"SELECT repaired_at FROM {DRIFT}") == [{"repaired_at": None}]


# --- objects -----------------------------------------------------------------------------------------------------------


def test_a_change_older_than_30_days_is_found_in_the_object_and_repaired_from_now_on(tmp_path: Path) -> None:
    events = [
        event(1, NOW - 80 * DAY, customer(), "customer.created"),
        event(2, NOW - 50 * DAY, customer(name="B", email="b@example.com"), previous={"name": "A", "email": "a@example.com"}),
    ]
    with bench(tmp_path, events, withheld={"evt_2"}) as b:
        report = b.reconcile("customer")
        assert report.events.missing == 0
        assert (report.objects["customer"].checked, report.objects["customer"].differing) == (1, 1)
        assert [(r["field"], r["state"], r["ours"], r["theirs"]) for r in rows(b.lake(), OPEN)] == [
            ("email", "differs", '"a@example.com"', '"b@example.com"'),
            ("name", "differs", '"A"', '"B"'),
        ]
        (record,) = b.topic.records
        assert dict(record.headers)["source"] == b"api_snapshot"
        sent = json.loads(record.value)
        assert (sent["id"], sent["created"], sent["type"]) == (f"snap_cus_1_{NOW}", NOW, "customer.api_snapshot")
        b.ingest()
        assert name_of(b) == "B"
        versions = rows(b.lake(), "SELECT event_id, created_at FROM billing.event_versions ORDER BY created_at")
        assert versions[1] == {"event_id": f"snap_cus_1_{NOW}", "created_at": datetime.fromtimestamp(NOW, UTC)}
        again = b.reconcile("customer")
        assert (again.objects["customer"].differing, again.open, again.resolved) == (0, 0, 2)


def test_an_object_never_heard_of_is_missing_and_comes_in(tmp_path: Path) -> None:
    events = [event(i, NOW - 60 * DAY + i, customer(f"cus_{i}"), "customer.created") for i in range(1, 4)]
    with bench(tmp_path, events, withheld={"evt_2"}) as b:
        report = b.reconcile("customer")
        assert (report.objects["customer"].checked, report.objects["customer"].missing) == (3, 1)
        assert [(r["object_id"], r["field"], r["state"]) for r in rows(b.lake(), OPEN)] == [("cus_2", "*", "missing")]
        b.ingest()
        assert name_of(b, "cus_2") == "A"
        assert b.reconcile("customer").open == 0


def test_an_object_that_stripe_deleted_long_ago_is_deleted_here(tmp_path: Path) -> None:
    events = [
        event(1, NOW - 80 * DAY, customer(), "customer.created"),
        event(2, NOW - 80 * DAY, customer("cus_2"), "customer.created"),
        event(3, NOW - 50 * DAY, customer(), "customer.deleted"),
    ]
    with bench(tmp_path, events, withheld={"evt_3"}) as b:
        report = b.reconcile("customer")
        assert report.objects["customer"].extra == 1
        assert [(r["object_id"], r["state"]) for r in rows(b.lake(), OPEN)] == [("cus_1", "extra")]
        b.ingest()
        assert rows(b.lake(), "SELECT object_id FROM billing.event_versions WHERE deleted") == [{"object_id": "cus_1"}]
        again = b.reconcile("customer")
        assert (again.objects["customer"].extra, again.open, again.resolved) == (0, 0, 1)


def test_another_rendering_of_the_same_state_is_no_difference(tmp_path: Path) -> None:
    """The webhook had the shape of 2024; fetched under basil, the period is in the items and `quantity` is gone."""
    price = {"id": "price_1", "product": "prod_streamforge_pro", "currency": "usd", "unit_amount": 100}
    old = {
        "id": "sub_1", "object": "subscription", "customer": "cus_1", "status": "active", "quantity": 2, "discount": None,
        "created": NOW - 70 * DAY, "start_date": NOW - 70 * DAY, "cancel_at_period_end": False,
        "current_period_start": NOW - DAY, "current_period_end": NOW + DAY,
        "plan": {"id": "price_1", "product": "prod_streamforge_pro", "amount": 100},
        "items": {"object": "list", "data": [{"id": "si_1", "object": "subscription_item", "quantity": 2, "price": price}]},
    }  # fmt: skip
    events = [event(1, NOW - 70 * DAY, old, "customer.subscription.created", version="2024-06-20")]
    with bench(tmp_path, events) as b:
        report = b.reconcile("subscription")
        assert (report.objects["subscription"].checked, report.differences) == (1, 0)


def test_what_is_still_on_its_way_is_not_called_a_difference(tmp_path: Path) -> None:
    """A change within the last minutes, a webhook in raw that is not built yet, an event that this run has just sent."""
    events = [
        *(event(i, NOW - 80 * DAY + i, customer(f"cus_{i}"), "customer.created") for i in range(1, 5)),
        event(11, NOW - 60, customer("cus_1", name="young")),
        event(12, NOW - HOUR, customer("cus_2", name="not built")),
        event(13, NOW - HOUR, customer("cus_3", name="just sent")),
        event(14, NOW - 50 * DAY, customer("cus_4", name="long ago")),
    ]
    with bench(tmp_path, events, withheld={"evt_11", "evt_12", "evt_13", "evt_14"}) as b:
        from tests import reconciling

        lake = b.lake()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reconciling, "run", lambda *_: None)
            feed(lake, [as_webhook(events[5])])
        report = b.reconcile("customer")
        counts = report.objects["customer"]
        assert (counts.in_flight, counts.differing) == (3, 1)
        assert {r["object_id"] for r in rows(b.lake(), OPEN) if r["object_type"] == "customer"} == {"cus_4"}


def test_an_object_that_the_normaliser_refuses_is_told(tmp_path: Path) -> None:
    sub = {"id": "sub_1", "object": "subscription", "customer": "cus_1", "status": "dormant", "created": NOW - 70 * DAY}
    with bench(tmp_path, [event(1, NOW - 70 * DAY, sub, "customer.subscription.created")], withheld={"evt_1"}) as b:
        report = b.reconcile("subscription")
        assert report.objects["subscription"].refused == 1
        assert [(r["object_id"], r["theirs"]) for r in rows(b.lake(), OPEN)] == [("sub_1", '{"refused":"unknown_status"}')]


# --- accounts and modes --------------------------------------------------------------------------------------------------


def test_accounts_and_modes_never_mix(tmp_path: Path) -> None:
    """The same event and object ids in our account, a connected one and in test mode: three things."""
    ours = [event(1, NOW - DAY, customer(name="ours"), id="evt_same")]
    tested = [event(2, NOW - DAY, customer(name="test", livemode=False), id="evt_same", livemode=False)]
    theirs = [event(3, NOW - DAY, customer(name="connected"), id="evt_same")]
    with bench(tmp_path, [*ours, *tested], withheld={"evt_same"}, accounts={"acct_1": theirs}) as b:
        assert b.reconcile().events.missing == 1
        assert b.reconcile(account="acct_1").events.missing == 1
        b.settings["stripe_api_key"] = SecretStr(TEST)
        assert b.reconcile().events.missing == 1
        b.ingest()
        found = rows(b.lake(), "SELECT account, livemode, state ->> 'name' AS name FROM billing.event_versions ORDER BY ALL")
        assert [tuple(r.values()) for r in found] == [
            ("acct_1", True, "connected"),
            ("platform", False, "test"),
            ("platform", True, "ours"),
        ]
        assert name_of(b) in ("ours", "connected")
        for account, key in (("acct_1", LIVE), (None, LIVE), (None, TEST)):
            b.settings["stripe_api_key"] = SecretStr(key)
            report = b.reconcile("customer", account=account)
            assert (report.events.missing, report.events.extra, report.differences, report.open) == (0, 0, 0, 0)


# --- limits and failures -------------------------------------------------------------------------------------------------


def test_the_rate_stays_within_its_share(tmp_path: Path) -> None:
    with bench(tmp_path, MANY, stripe_rate_limit=40.0, stripe_rate_share=0.5) as b:
        report = b.reconcile(since=datetime.fromtimestamp(NOW - 29 * DAY, UTC))
        at = [s.at for s in b.api.seen]
        assert report.requests == len(at) > 25
        for start in at:  # in any second at most rate + burst
            assert sum(start <= t < start + 1.0 for t in at) <= 20 + 1
        assert report.refused == 0
        assert report.waited_seconds > 0


def test_a_limit_of_stripe_is_waited_out(tmp_path: Path) -> None:
    """Our budget is larger than what Stripe allows here: 429 with Retry-After, and all of it arrives."""
    faults = Faults(rate_per_second=10, retry_after=0.3)
    with bench(tmp_path, MANY, withheld={"evt_003"}, faults=faults, stripe_rate_limit=200.0, stripe_rate_share=1.0) as b:
        report = b.reconcile()
        assert (report.events.listed, report.events.missing) == (250, 1)
        assert report.refused > 0
        seen = b.api.seen
        waits = [later.at - refused.at for refused, later in itertools.pairwise(seen) if refused.status == 429]
        assert min(waits) >= 0.3


@pytest.mark.parametrize("wait", ["1", "Wed, 21 Oct 2015 07:28:00 GMT", None])
def test_every_spelling_of_retry_after(tmp_path: Path, wait: str | None) -> None:
    faults = Faults(script=deque(["429" if wait is None else f"429:{wait}"]))
    with bench(tmp_path, MANY[:3], faults=faults) as b:
        started = time.monotonic()
        assert b.reconcile().refused == 1
        assert (time.monotonic() - started >= 1.0) or wait != "1"


def test_connections_that_break_in_the_middle_and_errors_are_asked_again(tmp_path: Path) -> None:
    faults = Faults(drop=0.15, fail=0.15)
    with bench(tmp_path, MANY, withheld={"evt_003", "evt_200"}, faults=faults) as b:
        report = b.reconcile("customer")
        assert (report.events.listed, report.events.missing) == (250, 2)
        assert report.failed > 2
        assert any(s.status == 0 for s in b.api.seen)
        assert any(s.status == 500 for s in b.api.seen)


def test_a_stripe_that_stays_away_is_retryable_and_keeps_what_was_reached(tmp_path: Path) -> None:
    with bench(tmp_path, MANY, withheld={"evt_003", "evt_249"}) as b:
        b.api.faults.script.extend(["ok"] * 20 + ["fail"] * 8)
        with pytest.raises(Retryable, match="does not answer GET /v1/events"):
            b.reconcile()
        b.ingest()
        report = b.reconcile()
        assert report.events.listed < 250
        assert (report.events.missing, report.resolved) == (1, 1)


def test_refusals_without_end_are_retryable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers.stripe_api, "REFUSALS", 3)
    with (
        bench(tmp_path, MANY[:1], faults=Faults(script=deque(["429:0"] * 3))) as b,
        pytest.raises(Retryable, match="endpoint-rate"),
    ):
        b.reconcile()


def test_a_refused_key_is_terminal_and_never_shown(tmp_path: Path) -> None:
    with bench(tmp_path, MANY[:1], stripe_api_key=SecretStr("sk_live_wrong_and_secret")) as b:
        with pytest.raises(Terminal, match="LAKEHOUSE_STRIPE_API_KEY") as caught:
            b.reconcile()
        assert "secret" not in str(caught.value)
        b.settings["stripe_api_key"] = None
        with pytest.raises(UsageError, match="set LAKEHOUSE_STRIPE_API_KEY"):
            b.reconcile()


def test_an_account_out_of_reach_is_terminal(tmp_path: Path) -> None:
    with bench(tmp_path, MANY[:1]) as b, pytest.raises(Terminal, match="may not GET"):
        b.reconcile(account="acct_of_others")


def test_an_unknown_object_type_is_told_the_known_ones(tmp_path: Path) -> None:
    with bench(tmp_path, MANY[:1]) as b, pytest.raises(UsageError, match="'invoicez'; object types: all, product"):
        b.reconcile("invoicez")


# --- interrupted ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit the position after every window."""
    import writers.reconcile

    monkeypatch.setattr(writers.reconcile, "KEEP_EVERY_SECONDS", 0.0)


@pytest.mark.usefixtures("eager")
def test_a_killed_run_goes_on_behind_its_last_commit_and_loses_nothing(tmp_path: Path) -> None:
    withheld = {f"evt_{i:03}" for i in range(5, 250, 20)}
    with bench(tmp_path, MANY, withheld=withheld) as b:
        b.topic.dies_after = 4
        with pytest.raises(KeyboardInterrupt):
            b.reconcile()
        b.topic.dies_after = None
        before = len(b.api.seen)
        b.ingest()
        report = b.reconcile()
        assert len(b.api.seen) - before < before + 25  # it did not begin at the beginning
        assert report.events.listed < 200
        b.ingest()
        assert b.reconcile().open == 0
        found = rows(b.lake(), "SELECT event_id, count(*) AS n FROM billing.event_versions GROUP BY ALL")
        assert {(r["event_id"], r["n"]) for r in found} == {(e.id, 1) for e in MANY}
        told = rows(b.lake(), f"SELECT object_id, count(*) AS n FROM {DRIFT} GROUP BY ALL")
        assert {r["object_id"] for r in told} == withheld - {r["object_id"] for r in told if r["n"] != 1}


def test_a_killed_sweep_goes_on_below(tmp_path: Path) -> None:
    events = [
        event(i, NOW - 60 * DAY + i, customer(f"cus_{i}", created=NOW - 90 * DAY + i), "customer.created") for i in range(450)
    ]
    with bench(tmp_path, events, withheld={f"evt_{i}" for i in (3, 100, 250, 449)}, batch_rows=100) as b:
        b.topic.dies_after = 2
        with pytest.raises(KeyboardInterrupt):
            b.reconcile("customer", events=False)
        b.topic.dies_after = None
        b.ingest()
        report = b.reconcile("customer", events=False)
        assert report.objects["customer"].checked < 350
        b.ingest()
        b.reconcile("customer", events=False)  # a new sweep, of all
        last = b.reconcile("customer", events=False)
        assert (last.objects["customer"].checked, last.differences, last.open) == (450, 0, 0)


def test_two_at_once_fence_each_other(tmp_path: Path) -> None:
    with bench(tmp_path, MANY, withheld={"evt_003"}) as b:
        lake, other = b.lake("slow"), b.lake("other")
        reader = StripeReader(lake.settings)
        real = reader.pages

        def pages(path: str, **parameters: Any) -> Iterator[Any]:
            if reader.spent.requests == 8:  # another run overtakes
                reconcile(other, StripeReader(other.settings), b.topic)
            return real(path, **parameters)

        reader.pages = pages  # type: ignore[method-assign]
        with pytest.raises(Fenced):
            reconcile(lake, reader, b.topic)
        b.ingest()
        assert b.reconcile().open == 0
