"""Repair: whatever is learnt late and in whatever batches, the events are as if all of them were attributed now."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lakehouse.lake import Lake, Run, open_lake
from lakehouse.plans import frame
from lakehouse.queries import bind_lake, connect
from lakehouse.runner import run
from lakehouse.settings import Settings
from tests.feed import feed_crm, feed_members, feed_product, feed_stripe
from transforms.product.attribution import INPUTS, attribute, known_for

TABLES = ["billing.event_versions", "billing.object_heads", "billing.subscription_history", *INPUTS, "product.events"]
hours = st.integers(0, 71).map(lambda h: f"2026-01-{7 + h // 24:02}T{h % 24:02}:30:00Z")
one_or_two = st.sampled_from([1, 2])
truths = st.one_of(
    st.tuples(st.just("billing"), one_or_two, hours, st.sampled_from([("starter", "active"), ("pro", "past_due")])),
    st.tuples(st.just("mapping"), one_or_two, hours, one_or_two),
    st.tuples(st.just("membership"), one_or_two, hours, one_or_two),
    st.tuples(st.just("identify"), one_or_two, hours, one_or_two),
)
rounds = st.lists(st.lists(truths, min_size=1, max_size=4), min_size=2, max_size=2)
"""What is learnt between one run and the next."""

EVENTS: list[dict[str, Any]] = [
    {"event_id": f"{n}-{kind}-{day}-{hour}", "occurred_at": f"2026-01-{day:02}T{hour:02}:00:00Z"} | who
    for n in (1, 2)
    for kind, who in {
        "sent": {"workspace_id": f"ws_{n}"},
        "user": {"workspace_id": ..., "user_id": f"usr_{n}"},
        "device": {"workspace_id": ..., "user_id": ..., "anonymous_id": f"an_{n}"},
    }.items()
    for day in (7, 8, 9)
    for hour in (3, 15)
]


def learn(lake: Lake, number: int, what: str, who: int, when: str, said: Any) -> None:
    """Feed one late truth, received on the 12th."""
    received = f"2026-01-12T00:00:{number:02}Z"
    if what == "billing":
        price, status = said
        subscription = {"id": f"sub_{who}", "customer": f"cus_{who}", "price": price, "status": status}
        feed_stripe(lake, {"id": f"evt_{number}", "at": when, "received": received, "subscription": subscription})
    elif what == "mapping":
        feed_crm(lake, (f"ws_{who}", f"cus_{said}", when, received))
    elif what == "membership":
        feed_members(lake, (f"usr_{who}", f"ws_{said}", when, received))
    else:
        identify = {"event_id": f"identify-{number}", "event_name": "identify", "workspace_id": ..., "occurred_at": when}
        feed_product(lake, identify | {"anonymous_id": f"an_{who}", "user_id": f"usr_{said}"}, received=received)


@settings(max_examples=2)
@given(rounds)
def test_repair_is_a_full_recompute(learnt: list[list[tuple[Any, ...]]]) -> None:
    with TemporaryDirectory() as home:
        lake = open_lake(Settings(home=Path(home)), Run("test", "test"))  # type: ignore[call-arg]
        begin = "2026-01-01T00:00:00Z"
        feed_stripe(lake, {"id": "evt_0", "type": "customer.subscription.created", "at": begin})
        feed_crm(lake, ("ws_1", "cus_1", begin, begin))
        feed_product(lake, *EVENTS, received="2026-01-10T00:00:00Z")
        run(lake, TABLES)
        number = 1
        for part in learnt:
            for truth in part:
                learn(lake, number, *truth)
                number += 1
            run(lake, TABLES)
            with connect(lake.settings) as connection:
                bind_lake(connection, lake, [*INPUTS, "product.events"])
                events = frame(connection, "SELECT * FROM product.events ORDER BY event_id")
                fresh = attribute(events, known_for(connection, events, lake.settings.catalog_dir))
            assert fresh.select(events.columns).equals(events)
