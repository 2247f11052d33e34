"""The revenue ledger as a function of the set of events and their first receipts, on random charges and invoices."""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from functools import cache
from random import Random
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyiceberg.io.pyarrow import schema_to_pyarrow

from lakehouse.declarations import load_declarations, load_reference
from lakehouse.errors import Terminal
from lakehouse.ledger import fold
from lakehouse.queries import bind_arrow, connect
from lakehouse.settings import load_settings
from lakehouse.transforms import Inputs
from transforms.billing import revenue_ledger

START = datetime(2026, 1, 1, tzinfo=UTC)
Event = dict[str, Any]
Truth = dict[tuple[str, str], int]  # (entry type, object id) -> signed amount


class Story:
    """What happens to one charge or invoice: events in the order in which they happen, and the truth about the money."""

    def __init__(self, rng: Random, name: str) -> None:
        self.rng, self.name, self.now = rng, name, START + timedelta(hours=rng.randrange(24 * 40))
        self.events: list[Event] = []
        self.truth: Truth = defaultdict(int)

    def later(self, days: float = 3) -> datetime:
        self.now += timedelta(seconds=self.rng.randrange(1, int(days * 86_400)))
        return self.now

    def tell(self, event_type: str, object_type: str, object_id: str, **state: Any) -> None:
        delay = self.rng.choice((0, 1, 1, 2, 600, 90_000, 260_000))
        state = {k: int(v.timestamp()) if isinstance(v, datetime) else v for k, v in state.items()}
        number = len(self.events)
        self.events.append(
            {
                "account": "platform",
                "livemode": True,
                "event_id": f"evt_{self.rng.randrange(10**6)}_{self.name}_{number}",
                "event_type": event_type,
                "object_type": object_type,
                "object_id": object_id,
                "created_at": self.now,
                "recorded_at": self.now + timedelta(seconds=delay),
                "state": json.dumps(state),
                "topic": "stripe",
                "partition": self.rng.randrange(3),
            }
        )


def charge_story(rng: Random, name: str) -> Story:
    story = Story(rng, name)
    charge, made, amount = f"ch_{name}", story.now, rng.randrange(100, 10_000)
    captured = refunded = 0

    def tell_charge(event_type: str) -> None:
        story.tell(
            event_type, "charge", charge, customer_id="cus", currency="usd", status="succeeded", captured=captured > 0,
            amount_minor=amount, amount_captured_minor=captured, amount_refunded_minor=refunded, created=made,
        )  # fmt: skip

    if rng.random() < 0.7:
        captured = amount
        tell_charge("charge.succeeded")
    else:
        tell_charge("charge.succeeded")
        if rng.random() < 0.2:
            return story  # never captured: no money
        story.later()
        captured = amount
        tell_charge("charge.captured")
    story.truth["charge", charge] += amount
    for number in range(rng.choice((0, 0, 1, 2, 3))):
        part = rng.randrange(1, amount - refunded) if amount - refunded > 1 else 0
        if not part:
            break
        if rng.random() < 0.8:  # else in the same second as what came before
            story.later()
        refund, at = f"re_{name}_{number}", story.now
        refunded += part
        told = {"charge_id": charge, "currency": "usd", "amount_minor": part, "created": at}
        story.tell("refund.created", "refund", refund, status="succeeded", **told)
        tell_charge("charge.refunded")
        story.truth["refund", refund] -= part
        if rng.random() < 0.3:
            story.later()
            refunded -= part
            story.tell("refund.failed", "refund", refund, status="failed", **told)
            tell_charge("charge.updated")
            story.truth["refund_failed", refund] += part
            story.later()
    if rng.random() < 0.4:
        story.later(20)
        dispute, kept = f"dp_{name}", amount - refunded
        moves: list[Event] = []

        def tell_dispute(event_type: str, status: str) -> None:
            told = {"charge_id": charge, "currency": "usd", "amount_minor": kept, "status": status}
            story.tell(event_type, "dispute", dispute, **told)
            whole = story.events[-1]
            for move in moves:  # they lie inside the dispute, and are versions at the same event
                story.events.append(
                    whole | {"object_type": "balance_transaction", "object_id": move["id"], "state": move["state"]}
                )

        def moved(sign: int, fee: int) -> None:
            state = {"source_id": dispute, "currency": "usd", "amount_minor": sign * kept, "fee_minor": fee}
            state["created"] = int(story.now.timestamp())
            moves.append({"id": f"txn_{name}_{len(moves)}", "state": json.dumps(state)})
            story.truth["dispute_withdrawn" if sign < 0 else "dispute_reinstated", dispute] += sign * kept
            story.truth["dispute_fee", dispute] -= fee

        if rng.random() < 0.2:
            tell_dispute("charge.dispute.created", "warning_needs_response")
            return story
        moved(-1, 1500)
        tell_dispute("charge.dispute.created", "needs_response")
        tell_dispute("charge.dispute.funds_withdrawn", "needs_response")
        story.later(20)
        won = rng.random() < 0.5
        if won:
            moved(1, rng.choice((0, -1500)))
        tell_dispute("charge.dispute.closed", "won" if won else "lost")
    return story


def invoice_story(rng: Random, name: str) -> Story:
    story = Story(rng, name)
    invoice, total = f"in_{name}", rng.choice((0, rng.randrange(100, 10_000), -rng.randrange(100, 900)))
    net = total * 100 // 119 if rng.random() < 0.3 else total
    times: dict[str, datetime] = {}
    credited = 0

    def tell(event_type: str, status: str, remaining: int) -> None:
        story.tell(
            event_type, "invoice", invoice, customer_id="cus", currency="usd", status=status, total_minor=total,
            total_excluding_tax_minor=net, amount_remaining_minor=remaining, **times,
        )  # fmt: skip

    tell("invoice.created", "draft", total)
    times["finalized_at"] = story.later()
    tell("invoice.finalized", "open", total)
    story.truth["invoice", invoice] += net
    ending = rng.choice(("open", "paid", "void", "uncollectible", "recovered", "written off, then void"))
    if total > 50 and ending in ("open", "paid") and rng.random() < 0.5:
        story.later()
        note, credited = f"cn_{name}", rng.randrange(1, total)
        told = {"invoice_id": invoice, "customer_id": "cus", "currency": "usd", "total_minor": credited, "created": story.now}
        story.tell("credit_note.created", "credit_note", note, status="issued", **told)
        story.truth["credit_note", note] -= credited
        if rng.random() < 0.3:
            story.tell("credit_note.voided", "credit_note", note, status="void", voided_at=story.later(), **told)
            story.truth["credit_note_voided", note] += credited
    if ending == "void":
        times["voided_at"] = story.later()
        tell("invoice.voided", "void", total)
        story.truth["invoice_voided", invoice] -= net
    if ending in ("uncollectible", "recovered", "written off, then void") and total > 0:
        times["marked_uncollectible_at"] = story.later()
        tell("invoice.marked_uncollectible", "uncollectible", total)
        story.truth["invoice_uncollectible", invoice] -= net
        story.later(30)
        if ending == "recovered":
            times["paid_at"] = story.now
            tell("invoice.paid", "paid", 0)
            story.truth["invoice_recovered", invoice] += net
        elif ending.endswith("void"):
            times["voided_at"] = story.now
            tell("invoice.voided", "void", 0)
    return story


def stories(seed: int, number: int = 120) -> list[Story]:
    rng = Random(seed)
    return [(charge_story if i % 3 else invoice_story)(rng, f"{i}") for i in range(number)]


@cache
def _schema() -> pa.Schema:
    declared = load_declarations(load_settings().catalog_dir)["billing.event_versions"]
    return pa.schema([f.with_nullable(True) for f in schema_to_pyarrow(declared.schema(), include_field_ids=False)])


def ledger(events: list[Event]) -> pl.DataFrame:
    """The entries that follow from the versions, in any order."""
    rows = [{f.name: e.get(f.name) for f in _schema()} | {"offset": 0} for e in events]
    configured = load_settings()
    with connect(configured) as connection:
        bind_arrow(connection, "billing.event_versions", pa.Table.from_pylist(rows, schema=_schema()))
        found = revenue_ledger.build(Inputs(connection, configured.catalog_dir))
    return pl.DataFrame(found).sort("account", "entry_id")


def net(entries: pl.DataFrame, *by: str) -> dict[tuple[Any, ...], int]:
    """Sums by columns, without those that are nothing."""
    sums = entries.group_by(*by).agg(pl.col("amount_minor").sum()).filter(pl.col("amount_minor") != 0)
    return {row[:-1]: row[-1] for row in sums.iter_rows()}


def all_events(told: list[Story]) -> list[Event]:
    return [e for s in told for e in s.events]


def true_of(told: list[Story]) -> Truth:
    return {k: v for s in told for k, v in s.truth.items() if v}


# Origins do not touch each other, so one case of 120 charges and invoices is 120 examples.
seeds = st.integers(0, 2**32)
few = settings(max_examples=12)


@few
@given(seeds)
def test_its_net_is_the_truth_whatever_the_order_of_receipt(seed):
    told = stories(seed)
    events = all_events(told)
    entries = ledger(events)
    assert net(entries, "entry_type", "object_id") == true_of(told)
    Random(seed).shuffle(events)
    assert ledger(events).equals(entries)


@few
@given(seeds, st.integers(0, 60 * 86_400))
def test_as_known_at_t_is_the_ledger_of_what_was_received_by_t(seed, after):
    moment = START + timedelta(seconds=after)
    events = all_events(stories(seed))
    then = ledger([e for e in events if e["recorded_at"] <= moment])
    assert ledger(events).filter(pl.col("recorded_at") <= moment).equals(then)


@few
@given(seeds)
def test_a_closed_day_never_moves(seed):
    rule = load_reference(load_settings().catalog_dir, "ledger")[0]
    zone = ZoneInfo(rule["time_zone"])

    def closes_at(day: date) -> datetime:
        end = datetime(day.year, day.month, day.day, tzinfo=zone) + timedelta(days=1)
        return end + timedelta(hours=rule["close_after_hours"])

    for row in ledger(all_events(stories(seed))).iter_rows(named=True):
        own = row["booked_at"].astimezone(zone).date()
        assert row["recorded_at"] < closes_at(row["posting_date"]), "posted to a day that was closed when it became known"
        if row["posting_date"] != own:
            assert closes_at(row["posting_date"] - timedelta(days=1)) <= row["recorded_at"], "an earlier day was still open"
            assert row["posting_date"] > own


@few
@given(seeds)
def test_every_entry_is_reversed_at_most_once_and_says_what_it_takes_back(seed):
    entries = ledger(all_events(stories(seed)))
    back = entries.filter(pl.col("reverses").is_not_null())
    assert back["reverses"].is_unique().all()
    pairs = back.join(entries, left_on=["account", "reverses"], right_on=["account", "entry_id"], suffix="_of")
    assert pairs.height == back.height
    assert (pairs["amount_minor"] == -pairs["amount_minor_of"]).all()
    for column in ("basis", "entry_type", "origin_id", "object_id", "currency", "effective_at", "booked_at", "customer_id"):
        assert pairs[column].eq_missing(pairs[f"{column}_of"]).all()
    assert (pairs["recorded_at"] > pairs["recorded_at_of"]).all()
    events = {(e["event_id"], e["recorded_at"]) for e in all_events(stories(seed))}
    assert set(entries.select("event_id", "recorded_at").iter_rows()) <= events


@few
@given(seeds, st.sampled_from(["itemised", "total", "either"]))
def test_refunds_count_once_whichever_of_their_events_come(seed, missing):
    """Drop refund events, or the charge's running totals, or some of both: what is left says the same."""
    told, rng = stories(seed), Random(seed)
    kept = []
    for event in all_events(told):
        itemised = event["object_type"] == "refund"
        total = event["event_type"] == "charge.refunded"
        if missing == "itemised":
            dropped = itemised
        elif missing == "total":
            dropped = total
        else:  # a refund's creation may be missing where a total tells of it
            dropped = event["event_type"] == "refund.created" and rng.random() < 0.5
        if not dropped:
            kept.append(event)
    refund_types = ("refund", "refund_failed")
    wanted: dict[str, int] = defaultdict(int)
    for story in told:
        for (entry_type, _), amount in story.truth.items():
            wanted[f"ch_{story.name}"] += amount if entry_type in refund_types else 0
    found = net(ledger(kept).filter(pl.col("entry_type").is_in(refund_types)), "origin_id")
    assert {k: v for (k,), v in found.items()} == {k: v for k, v in wanted.items() if v}


# The fold by itself, on any postings

postings = st.lists(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2)), unique_by=lambda p: p[0]), min_size=1, max_size=6
)


@given(st.lists(postings, min_size=1, max_size=4))
def test_the_entries_up_to_each_step_net_to_the_postings_at_that_step(groups):
    schema = {"group": pl.Int64, "step": pl.Int64, "key": pl.String, "value": pl.Int64}
    rows = [(g, s, *p) for g, steps in enumerate(groups) for s, step in enumerate(steps, 1) for p in step]
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    steps = pl.DataFrame(
        [(g, s) for g, of in enumerate(groups) for s in range(1, len(of) + 1)],
        schema={"group": pl.Int64, "step": pl.Int64},
        orient="row",
    )
    entries = fold(frame.sample(fraction=1, shuffle=True, seed=1), steps, group=["group"], key=["key"], fields=["value"])
    for g, of in enumerate(groups):
        standing: dict[str, list[int]] = defaultdict(list)
        for s, step in enumerate(of, 1):
            now = entries.filter((pl.col("group") == g) & (pl.col("step") == s)).sort("reverses_step", nulls_last=True)
            for row in now.iter_rows(named=True):
                if row["reverses_step"] is None:
                    standing[row["key"]].append(row["value"])
                else:
                    assert standing[row["key"]].pop() == row["value"]
            assert {k: v for k, v in standing.items() if v} == {k: [v] for k, v in step}


def test_two_postings_of_one_key_are_refused() -> None:
    frame = pl.DataFrame({"group": [1, 1], "step": [1, 1], "key": ["a", "a"], "value": [1, 2]})
    with pytest.raises(Terminal, match="share one key"):
        fold(frame, pl.DataFrame({"group": [1], "step": [1]}), group=["group"], key=["key"], fields=["value"])
    with pytest.raises(Terminal, match="name a step"):
        fold(frame[:1], pl.DataFrame({"group": [1], "step": [2]}), group=["group"], key=["key"], fields=["value"])
