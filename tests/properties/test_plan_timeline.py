"""billing.plan_timeline and billing.mrr_movements against a search through every subscription at every moment."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from math import floor
from typing import Any

import pyarrow as pa
from hypothesis import example, given
from hypothesis import strategies as st
from pyiceberg.io.pyarrow import schema_to_pyarrow

from lakehouse.declarations import load_declarations, load_reference
from lakehouse.queries import bind_arrow, connect
from lakehouse.settings import load_settings
from lakehouse.transforms import Inputs, load_transforms

START = datetime(2026, 1, 1, tzinfo=UTC)
STEP = timedelta(hours=7)  # several changes a day, and days without any
MOMENTS = 40
SETTINGS = load_settings()
DECLARED = load_declarations(SETTINGS.catalog_dir)
TRANSFORMS = load_transforms(SETTINGS.transforms_dir, DECLARED)
STATUSES = {row["status"]: row for row in load_reference(SETTINGS.catalog_dir, "statuses")}
PLANS = {None: None, "starter": 1, "pro": 2, "enterprise": 3}

states = st.fixed_dictionaries(
    {
        "status": st.sampled_from(sorted(STATUSES)),
        "plan": st.sampled_from([None, "starter", "pro", "enterprise"]),
        "quantity": st.integers(1, 3),
        "monthly_minor": st.sampled_from([None, 0, 100, 4900, 199_000]),
        "currency": st.sampled_from(["usd", "usd", "eur"]),
        "collection_paused": st.booleans(),
    }
)
# a subscription: when it and each of its later states began
subscriptions = st.lists(st.tuples(st.integers(0, MOMENTS - 1), states), min_size=1, max_size=5, unique_by=lambda s: s[0])
customers = st.lists(subscriptions, min_size=1, max_size=4)

PRO = {
    "status": "active",
    "plan": "pro",
    "quantity": 1,
    "monthly_minor": 100,
    "currency": "usd",
    "collection_paused": False,
}
TWINS = [[(3, PRO)], [(3, PRO)]]  # equal in all but the id


def history(customer: list[list[tuple[int, dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Rows of billing.subscription_history, `from` and `to` in steps beside them."""
    found = []
    for number, told in enumerate(customer):
        ordered = sorted(told, key=lambda s: s[0])
        for (at, state), after in zip(ordered, [*ordered[1:], None], strict=True):
            to = after[0] if after else None
            found.append(
                {
                    **state,
                    "account": "platform",
                    "customer_id": "cus_1",
                    "subscription_id": f"sub_{number}",
                    "billing_status": STATUSES[state["status"]]["billing_status"],
                    "plan_rank": PLANS[state["plan"]],
                    "price_id": f"price_{state['plan']}",
                    "cancel_at_period_end": False,
                    "valid_from": START + at * STEP,
                    "valid_to": None if to is None else START + to * STEP,
                    "from": at,
                    "to": to,
                    "began": ordered[0][0],
                }
            )
    return found


def build(table: str, rows: list[dict[str, Any]], source: str = "billing.subscription_history") -> list[dict[str, Any]]:
    schema = schema_to_pyarrow(DECLARED[source].schema(), include_field_ids=False)
    nullable = pa.schema([f.with_nullable(True) for f in schema])
    with connect(SETTINGS) as connection:
        given_rows = [{f.name: r.get(f.name) for f in nullable} for r in rows]
        bind_arrow(connection, source, pa.Table.from_pylist(given_rows, schema=nullable))
        return TRANSFORMS[table].build(Inputs(connection, SETTINGS.catalog_dir)).rows.to_pylist()


@given(customers)
@example(TWINS)
def test_at_every_moment_the_best_subscription_is_in_force(customer):
    rows = history(customer)
    timeline = sorted(build("billing.plan_timeline", rows), key=lambda r: r["valid_from"])
    assert timeline[0]["valid_from"] == min(r["valid_from"] for r in rows)
    assert timeline[-1]["valid_to"] is None
    for before, after in pairwise(timeline):
        assert before["valid_from"] < before["valid_to"] == after["valid_from"]
        assert any(before[c] != after[c] for c in before if c not in ("valid_from", "valid_to")), "equal neighbours"
    for moment in range(MOMENTS):
        live = [r for r in rows if r["from"] <= moment and (r["to"] is None or moment < r["to"])]
        at = START + moment * STEP
        found = [r for r in timeline if r["valid_from"] <= at and (r["valid_to"] is None or at < r["valid_to"])]
        if not live:
            assert not found
            continue
        best = max(
            live,
            key=lambda r: (-STATUSES[r["status"]]["preference"], r["plan_rank"] or 0, r["began"], r["subscription_id"]),
        )
        assert len(found) == 1
        for column in ("subscription_id", "plan", "billing_status", "price_id", "quantity", "currency"):
            assert found[0][column] == best[column]
        assert found[0]["mrr_minor"] == (best["monthly_minor"] if best["status"] in ("active", "past_due") else 0)


@given(customers)
def test_movements_sum_to_the_mrr_of_every_day(customer):
    rows = history(customer)
    movements = build("billing.mrr_movements", rows)
    for currency in ("usd", "eur"):
        own = sorted((m for m in movements if m["currency"] == currency), key=lambda m: m["movement_date"])
        assert len({m["movement_date"] for m in own}) == len(own)
        ever = 0
        total = 0
        for day in (START.date() + timedelta(days=n) for n in range(int(MOMENTS * STEP / timedelta(days=1)) + 2)):
            end = datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=1)
            true = sum(
                r["monthly_minor"] or 0
                for r in rows
                if r["currency"] == currency
                and r["status"] in ("active", "past_due")
                and r["valid_from"] < end
                and (r["valid_to"] is None or r["valid_to"] >= end)
            )
            today = [m for m in own if m["movement_date"] == day]
            assert bool(today) == (true != total)
            for m in today:
                assert (m["before_minor"], m["after_minor"], m["change_minor"]) == (total, true, true - total)
                kind = ("new", "reactivation")[ever > 0] if total == 0 else "churn" if true == 0 else None
                assert m["movement"] == (kind or ("expansion" if true > total else "contraction"))
            total, ever = true, max(ever, true)
        assert sum(m["change_minor"] for m in own) == total


# (unit_amount, unit_amount_decimal): Stripe gives the first where the price is a whole number of minor units; tiers have neither
amounts = st.one_of(
    st.just((None, None)),
    st.integers(0, 10**9).map(lambda n: (n, None)),
    st.integers(0, 10**9).map(lambda n: (n, str(n))),
    st.decimals(0, 10**6, places=12).map(lambda d: (None, f"{d:f}")),
)
items_of_one = st.fixed_dictionaries(
    {
        "quantity": st.integers(0, 1000),
        "amount": amounts,
        "billing_interval": st.sampled_from(["day", "week", "month", "year"]),
        "billing_interval_count": st.integers(1, 6),
        "usage_type": st.sampled_from([None, "licensed", "licensed", "metered"]),
    }
)


def monthly(item: dict[str, Any]) -> int | None:
    """The monthly value of one item by exact fractions, rounded half up."""
    price = next((a for a in item["amount"] if a is not None), None)
    if price is None:
        return None
    a_year = {"day": 365, "week": 52, "month": 12, "year": 1}[item["billing_interval"]]
    return floor(Fraction(price) * item["quantity"] * a_year / (12 * item["billing_interval_count"]) + Fraction(1, 2))


@given(st.lists(st.lists(items_of_one, min_size=1, max_size=4), min_size=1, max_size=12))
def test_the_items_of_a_subscription_make_its_monthly_value(listed):
    versions = []
    for number, items in enumerate(listed):
        parts = [
            {
                "subscription_item_id": f"si_{i}",
                "currency": "usd",
                "unit_amount_minor": item["amount"][0],
                "unit_amount_decimal": item["amount"][1],
                **{name: value for name, value in item.items() if name != "amount"},
            }
            for i, item in enumerate(items)
        ]
        own = {k: v for k, v in parts[0].items() if k not in ("subscription_item_id", "unit_amount_decimal")}
        state = {"customer_id": "cus_1", "status": "active", **own, "items": parts}
        versions.append(
            {
                "account": "platform",
                "livemode": True,
                "object_type": "subscription",
                "object_id": f"sub_{number:02}",
                "event_id": f"evt_{number}",
                "event_type": "customer.subscription.created",
                "created_at": START,
                "recorded_at": START,
                "deleted": False,
                "rank": 0,
                "state": json.dumps(state),
                "previous": "{}",
            }
        )
    found = sorted(build("billing.subscription_history", versions, "billing.event_versions"), key=lambda r: r["subscription_id"])
    assert len(found) == len(listed)
    for row, items in zip(found, listed, strict=True):
        counted = [monthly(item) for item in items if item["usage_type"] != "metered"]
        known = [value for value in counted if value is not None]
        assert row["monthly_minor"] == (sum(known) if known or not counted else None)
