"""product.events on a real lake: what is refused, what is deduplicated, how events are attributed and repaired."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from lakehouse.errors import Terminal, UsageError
from lakehouse.lake import Lake, Run, history, open_lake
from lakehouse.rollback import rollback_table
from lakehouse.runner import run, run_table
from lakehouse.settings import Settings
from tests.feed import CLEAN, feed_crm, feed_members, feed_product, feed_stripe, rewritten, rows

RECEIVED = "2026-01-10T12:00:05Z"
ALL = 'SELECT * EXCLUDE (topic, partition, "offset") FROM product.events ORDER BY event_id'
OUTCOME = "SELECT event_id, attribution, customer_id, plan, billing_status FROM product.events ORDER BY event_id"


def make(path: Path) -> Lake:
    return open_lake(Settings(home=path), Run("test", "test"))


@pytest.fixture
def road(tmp_path: Path) -> Lake:
    """A lake in which ws_1 belongs to cus_1, who is on starter since 1 January."""
    lake = make(tmp_path / "road")
    feed_stripe(lake, {"id": "evt_1", "type": "customer.subscription.created", "at": "2026-01-01T00:00:00Z"})
    feed_crm(lake, ("ws_1", "cus_1", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"))
    return lake


def test_what_cannot_be_used_is_kept_with_its_reason_and_holds_nobody_up(road: Lake) -> None:
    cases: list[tuple[object, str | None]] = [
        ({"event_id": "ok"}, None),
        (None, "tombstone"),
        (b"", "not_json"),
        (b'{"event_id": "x"', "not_json"),
        (b"\xff\xfe\x00", "not_json"),
        (b"[1]", "not_json"),
        (b'"text"', "not_json"),
        ({"event_id": ...}, "missing_event_id"),
        ({"event_id": None}, "missing_event_id"),
        ({"event_name": ...}, "missing_event_name"),
        ({"occurred_at": ...}, "missing_occurred_at"),
        ({"event_id": 7}, "wrong_type_event_id"),
        ({"workspace_id": 7}, "wrong_type_workspace_id"),
        ({"workspace_id": {"id": "ws_1"}}, "wrong_type_workspace_id"),
        ({"occurred_at": 1767225600}, "wrong_type_occurred_at"),
        ({"occurred_at": "2026-01-10T12:00:00"}, "bad_occurred_at"),
        ({"occurred_at": "yesterday"}, "bad_occurred_at"),
        ({"occurred_at": "2026-13-41T12:00:00Z"}, "bad_occurred_at"),
        ({"occurred_at": "2025-12-11T12:00:04Z"}, "too_late"),
        ({"event_id": "edge_late", "occurred_at": "2025-12-11T12:00:05Z"}, None),
        ({"occurred_at": "2026-01-10T12:10:06Z"}, "from_the_future"),
        ({"schema_version": "three"}, "wrong_type_schema_version"),
        ({"properties": {"k": "x" * 10_000_000}}, "too_large"),
        ({"event_id": "edge_early", "occurred_at": "2026-01-10T12:10:05Z"}, None),
        ({"event_id": "offset_zone", "occurred_at": "2026-01-10T14:00:00+02:00"}, None),
    ]
    feed_product(road, *(c for c, _ in cases), received=RECEIVED)  # type: ignore[arg-type]
    run(road)
    found = {r["offset"]: r["reason"] for r in rows(road, 'SELECT "offset", reason FROM ops.dead_letters')}
    assert found == {i: reason for i, (_, reason) in enumerate(cases) if reason}
    kept = {r["event_id"]: r for r in rows(road, ALL)}
    assert sorted(kept) == ["edge_early", "edge_late", "offset_zone", "ok"]
    assert kept["offset_zone"]["occurred_at"] == kept["ok"]["occurred_at"]
    assert kept["edge_late"]["late"]
    assert not kept["ok"]["late"]
    # the dead letters were committed before the rows they were left out of
    dead, events = (history(road.load(n))[0].timestamp_ms for n in ("ops.dead_letters", "product.events"))
    assert dead <= events


def test_unknown_fields_are_kept_and_reported_and_nested_ones_stay_text(road: Lake) -> None:
    feed_product(road, {"event_id": "a", "experiment": {"arm": "B"}, "referrer": "x"}, {"event_id": "b"}, received=RECEIVED)
    run(road)
    feed_product(road, {"event_id": "c", "referrer": "y"}, received=RECEIVED)
    run(road)
    reported = rows(road, "SELECT field, events FROM product.unknown_fields WHERE event_date = '2026-01-10' ORDER BY field")
    assert [tuple(r.values()) for r in reported] == [("experiment", 1), ("referrer", 2)]
    a, b, _ = rows(road, "SELECT extra, properties FROM product.events ORDER BY event_id")
    assert a == {"extra": '{"experiment":{"arm":"B"},"referrer":"x"}', "properties": '{"k": 1}'} or a["extra"] is not None
    assert b["extra"] is None
    assert '"k"' in b["properties"]


def test_an_event_counts_once_and_the_split_into_batches_does_not_matter(tmp_path: Path) -> None:
    """The first receipt wins, also when it is committed last (another partition was slower)."""
    copies = [("first", "2026-01-10T12:00:05Z"), ("second", "2026-01-10T12:00:09Z"), ("third", "2026-01-11T09:00:00Z")]
    answers = []
    for number, order in enumerate([(0, 1, 2), (2, 1, 0), (1, 2, 0)]):
        for each_its_batch in (True, False):
            lake = make(tmp_path / f"{number}{each_its_batch}")
            for i in order:
                # each copy in a topic of its own, so that any order of commits is possible
                feed_product(lake, {"event_id": "e", "user_id": copies[i][0]}, received=copies[i][1], topic=f"p{i}")
                if each_its_batch:
                    run(lake, CLEAN)
            run(lake, CLEAN)
            answers.append(rows(lake, ALL))
    assert all(a == answers[0] for a in answers)
    assert [r["user_id"] for r in answers[0]] == ["first"]


def test_outcomes(road: Lake) -> None:
    feed_product(
        road,
        {"event_id": "a_before", "occurred_at": "2025-12-31T23:59:59.999Z"},
        {"event_id": "b_first", "occurred_at": "2026-01-01T00:00:00Z"},
        {"event_id": "c_unknown", "workspace_id": "ws_404"},
        {"event_id": "d_none", "workspace_id": ...},
        received=RECEIVED,
    )
    feed_crm(
        road,
        ("ws_1", "cus_1", "2025-12-01T00:00:00Z", "2026-01-02T00:00:00Z"),
        ("ws_2", "cus_9", "2025-12-01T00:00:00Z", "2026-01-02T00:00:00Z"),
    )
    feed_product(road, {"event_id": "e_nosub", "workspace_id": "ws_2"}, received=RECEIVED)
    run(road)
    assert [tuple(r.values()) for r in rows(road, OUTCOME)] == [
        ("a_before", "no_subscription", "cus_1", None, None),
        ("b_first", "resolved", "cus_1", "starter", "active"),
        ("c_unknown", "unmapped_workspace", None, None, None),
        ("d_none", "unmapped_workspace", None, None, None),
        ("e_nosub", "no_subscription", "cus_9", None, None),
    ]


def test_an_event_without_a_workspace_has_that_of_its_user(road: Lake) -> None:
    feed_crm(road, ("ws_2", "cus_1", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"))
    feed_crm(road, ("ws_2", "cus_2", "2026-01-10T06:00:00Z", "2026-01-10T06:00:00Z"), mapping="second")
    feed_members(
        road,
        ("u_one", "ws_1", "2026-01-05T00:00:00Z", "2026-01-05T00:00:00Z"),
        ("u_two", "ws_1", "2026-01-05T00:00:00Z", "2026-01-05T00:00:00Z"),
        ("u_two", "ws_2", "2026-01-08T00:00:00Z", "2026-01-08T00:00:00Z"),
        ("u_other", "ws_2", "2026-01-05T00:00:00Z", "2026-01-05T00:00:00Z"),
        ("u_unmapped", "ws_9", "2026-01-05T00:00:00Z", "2026-01-05T00:00:00Z"),
    )
    here = {"workspace_id": ..., "user_id": "u_one"}
    feed_product(
        road,
        {"event_id": "a_one"} | here,
        {"event_id": "b_before", "occurred_at": "2026-01-04T23:59:59Z"} | here,
        {"event_id": "c_two"} | here | {"user_id": "u_two"},
        {"event_id": "d_two_yet_one", "occurred_at": "2026-01-07T23:59:59Z"} | here | {"user_id": "u_two"},
        {"event_id": "e_customers"} | here | {"user_id": "u_other"},
        {"event_id": "f_sent", "workspace_id": "ws_1", "user_id": "u_two"},
        {"event_id": "g_customers", "workspace_id": "ws_2"},
        {"event_id": "h_unmapped"} | here | {"user_id": "u_unmapped"},
        {"event_id": "i_stranger"} | here | {"user_id": "u_404"},
        {"event_id": "j_nobody"} | here | {"user_id": ...},
        received=RECEIVED,
    )
    run(road)
    found = rows(
        road,
        "SELECT event_id, workspace_id, attributed_workspace_id, workspace_source, attribution, account, customer_id, plan "
        "FROM product.events ORDER BY event_id",
    )
    assert [tuple(r.values()) for r in found] == [
        ("a_one", None, "ws_1", "membership", "resolved", "platform", "cus_1", "starter"),
        ("b_before", None, None, None, "unmapped_workspace", None, None, None),
        ("c_two", None, None, None, "ambiguous", None, None, None),
        ("d_two_yet_one", None, "ws_1", "membership", "resolved", "platform", "cus_1", "starter"),
        ("e_customers", None, "ws_2", "membership", "ambiguous", None, None, None),
        ("f_sent", "ws_1", "ws_1", "sent", "resolved", "platform", "cus_1", "starter"),
        ("g_customers", "ws_2", "ws_2", "sent", "ambiguous", None, None, None),
        ("h_unmapped", None, "ws_9", "membership", "unmapped_workspace", None, None, None),
        ("i_stranger", None, None, None, "unmapped_workspace", None, None, None),
        ("j_nobody", None, None, None, "unmapped_workspace", None, None, None),
    ]
    assert rows(road, "SELECT count(DISTINCT customers) AS n FROM billing.workspace_customer_history") == [{"n": 2}]


def test_an_anonymous_id_belongs_to_the_user_that_it_was_identified_as(road: Lake) -> None:
    feed_members(
        road,
        ("u_one", "ws_1", "2025-12-01T00:00:00Z", "2026-01-05T00:00:00Z"),
        ("u_two", "ws_2", "2025-12-01T00:00:00Z", "2026-01-05T00:00:00Z"),
    )

    def seen(event_id: str, at: str, anonymous: object = "an_1", **more: object) -> dict[str, object]:
        return {"event_id": event_id, "occurred_at": f"2026-01-{at}Z", "anonymous_id": anonymous, "user_id": ...} | more

    nowhere: dict[str, object] = {"workspace_id": ...}
    feed_product(
        road,
        seen("a_before", "06T00:00:00", **nowhere),
        seen("b_identify", "07T00:00:00", event_name="identify", user_id="u_one", **nowhere),
        seen("c_after", "07T12:00:00", **nowhere),
        seen("d_just_before", "07T23:59:59.999", **nowhere),
        seen("e_other_user", "08T00:00:00", event_name="identify", user_id="u_two", **nowhere),
        seen("f_other", "08T00:00:00", **nowhere),
        seen("g_sent_user", "08T00:00:00", user_id="u_one", **nowhere),
        seen("h_sent_workspace", "08T00:00:00"),
        seen("i_other_device", "08T00:00:00", "an_2", **nowhere),
        seen("j_no_user", "08T00:00:00", "an_2", event_name="identify", **nowhere),
        seen("k_no_device", "08T00:00:00", ..., **nowhere),
        received=RECEIVED,
    )
    run(road)
    found = rows(
        road,
        "SELECT event_id, identified_user_id, attributed_workspace_id, workspace_source FROM product.events ORDER BY event_id",
    )
    assert [tuple(r.values()) for r in found] == [
        ("a_before", "u_one", "ws_1", "identity"),
        ("b_identify", None, "ws_1", "membership"),
        ("c_after", "u_one", "ws_1", "identity"),
        ("d_just_before", "u_one", "ws_1", "identity"),
        ("e_other_user", None, "ws_2", "membership"),
        ("f_other", "u_two", "ws_2", "identity"),
        ("g_sent_user", None, "ws_1", "membership"),
        ("h_sent_workspace", None, "ws_1", "sent"),
        ("i_other_device", None, None, None),
        ("j_no_user", None, None, None),
        ("k_no_device", None, None, None),
    ]


@pytest.mark.parametrize("before", [0, 1])
def test_an_identify_event_that_comes_twice_counts_once(road: Lake, before: int) -> None:
    """Within a batch and across two; the first batch of the table, and one that finds others there."""
    said: dict[str, object] = {"event_name": "identify", "anonymous_id": "an_1", "workspace_id": ...}
    feed_product(road, *[said | {"event_id": "other"}] * before, received=RECEIVED)
    run(road)
    feed_product(road, *[said | {"event_id": "same"}] * 2, received="2026-01-10T12:00:09Z")
    feed_product(road, said | {"event_id": "same"}, received=RECEIVED)
    run(road)
    feed_product(road, said | {"event_id": "same"}, received=RECEIVED)
    run(road)
    found = rows(road, "SELECT event_id, received_at FROM product.identifications ORDER BY event_id")
    assert [(r["event_id"], r["received_at"].second) for r in found] == [("other", 5)] * before + [("same", 5)]


LATE_TRUTHS = {
    "billing": lambda lake: feed_stripe(
        lake,
        {
            "id": "evt_2",
            "at": "2026-01-10T11:00:00Z",
            "received": "2026-01-13T00:00:00Z",
            "subscription": {"price": "pro", "status": "past_due"},
        },
    ),
    "moved workspace": lambda lake: feed_crm(lake, ("ws_1", "cus_2", "2026-01-10T11:30:00Z", "2026-01-12T00:00:00Z")),
    "first mapping": lambda lake: feed_crm(lake, ("ws_2", "cus_1", "2026-01-05T00:00:00Z", "2026-01-12T00:00:00Z")),
    "second customer": lambda lake: feed_crm(
        lake, ("ws_1", "cus_9", "2026-01-10T11:00:00Z", "2026-01-12T00:00:00Z"), mapping="second"
    ),
    "identify events": lambda lake: feed_product(
        lake,
        *(
            {
                "event_id": f"z_{a}",
                "event_name": "identify",
                "anonymous_id": a,
                "user_id": "usr_8",
                "occurred_at": "2026-01-09T00:00:00Z",
            }
            for a in DEVICES  # of one it is the first, of the other the second
        ),
        received="2026-01-11T00:00:00Z",
    ),
    "first membership": lambda lake: feed_members(lake, ("usr_7", "ws_1", "2026-01-09T00:00:00Z", "2026-01-12T00:00:00Z")),
    "second membership": lambda lake: feed_members(lake, ("usr_8", "ws_2", "2026-01-10T11:00:00Z", "2026-01-12T00:00:00Z")),
}
USERS = ("usr_7", "usr_8")
DEVICES = ("an_1", "an_2")
MEMBERS = [("usr_8", "ws_1", "2026-01-08T00:00:00Z", "2026-01-08T00:00:00Z")]


@pytest.mark.parametrize("late", LATE_TRUTHS)
def test_repair_equals_a_full_recompute_and_leaves_other_files_alone(tmp_path: Path, road: Lake, late: str) -> None:
    events = [
        {"event_id": f"{w}-{day:02}-{hour:02}", "workspace_id": w, "occurred_at": f"2026-01-{day:02}T{hour:02}:00:00Z"}
        for w in ("ws_1", "ws_2", "ws_3")
        for day in (8, 9, 10)
        for hour in (10, 12)
    ]
    unplaced = [e | {"event_id": f"{u}-{e['event_id']}", "workspace_id": ..., "user_id": u} for e in events[:6] for u in USERS]
    unknown = [
        e | {"event_id": f"{a}-{e['event_id']}", "user_id": ..., "anonymous_id": a} for e in unplaced[:12:2] for a in DEVICES
    ]
    known = {"event_id": "id", "event_name": "identify", "anonymous_id": "an_2", "user_id": "usr_7", "workspace_id": ...}
    events += [*unplaced, *unknown, known | {"occurred_at": "2026-01-08T11:00:00Z"}]
    feed_members(road, *MEMBERS)
    feed_product(road, *events, received=RECEIVED)
    run(road)
    before = {t.file.file_path for t in road.load("product.events").scan().plan_files()}
    untouched = rows(road, "SELECT event_id FROM product.events WHERE workspace_id = 'ws_3' ORDER BY event_id")
    old = rows(road, OUTCOME)
    LATE_TRUTHS[late](road)
    reports = run(road)
    after = {t.file.file_path for t in road.load("product.events").scan().plan_files()}
    assert rows(road, OUTCOME) != old, "the late truth must change something"
    report = next(r for r in reports if r.table == "product.events")
    assert report.files_removed == len(before - after) > 0
    assert before & after, "only files that hold a changed event are written again"
    assert rows(road, "SELECT event_id FROM product.events WHERE workspace_id = 'ws_3' ORDER BY event_id") == untouched

    again = make(tmp_path / "again")
    feed_stripe(again, {"id": "evt_1", "type": "customer.subscription.created", "at": "2026-01-01T00:00:00Z"})
    feed_crm(again, ("ws_1", "cus_1", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"))
    feed_members(again, *MEMBERS)
    LATE_TRUTHS[late](again)
    feed_product(again, *events, received=RECEIVED)
    run(again)
    assert rows(road, ALL) == rows(again, ALL)


def test_a_timeline_that_overlaps_holds_the_events_back_until_it_is_right(road: Lake) -> None:
    feed_product(road, {"event_id": "a"}, received=RECEIVED)
    run(road)
    right = road.load("billing.plan_timeline").current_snapshot()
    assert right is not None
    an_hour_later = pl.col("valid_from") + pl.duration(hours=1)
    rewritten(road, "billing.plan_timeline", lambda t: pl.concat([t, t.with_columns(an_hour_later, plan=pl.lit("pro"))]))
    feed_product(road, {"event_id": "b"}, received=RECEIVED)
    with pytest.raises(Terminal, match="1 intervals overlap the one before them for the same account, customer_id"):
        run(road, CLEAN)
    assert [r["event_id"] for r in rows(road, OUTCOME)] == ["a"], "nothing is published"
    rollback_table(road, "billing.plan_timeline", right.snapshot_id)
    run(road, CLEAN)
    assert [(r["event_id"], r["plan"]) for r in rows(road, OUTCOME)] == [("a", "starter"), ("b", "starter")]


def test_running_again_changes_nothing(road: Lake) -> None:
    feed_product(road, {"event_id": "a"}, received=RECEIVED)
    run(road)
    snapshots = {name: len(history(road.load(name))) for name in road.existing()}
    assert all(r.snapshot_id is None for r in run(road))
    assert {name: len(history(road.load(name))) for name in road.existing()} == snapshots


def test_repair_is_not_lost_when_an_input_lags(road: Lake, tmp_path: Path) -> None:
    """The timeline was built in part: what product.events then reads, and what it says it has read, must be the same."""
    feed_product(road, {"event_id": "a"}, received=RECEIVED)
    run(road)
    feed_stripe(road, {"id": "evt_2", "at": "2026-01-05T00:00:00Z", "subscription": {"price": "pro"}})
    feed_stripe(
        road,
        *(
            {"id": f"evt_{n}", "at": f"2026-01-0{n}T00:00:00Z", "subscription": {"id": "sub_9", "customer": "cus_9"}}
            for n in (5, 6, 7)
        ),
    )
    ahead = ["billing.event_versions", "billing.subscription_history"]
    run(road, ahead)
    slow = open_lake(road.settings.model_copy(update={"batch_rows": 1}), Run("slow", "test"))
    run_table(slow, "billing.plan_timeline")
    run(road, CLEAN)
    run(road)
    assert [r["plan"] for r in rows(road, "SELECT plan FROM product.events")] == ["pro"]


def test_the_vector_of_a_table_describes_its_content(tmp_path: Path) -> None:
    """An input that is ahead in one partition is read only as far as the positions say."""
    lake = make(tmp_path / "cut")
    feed_stripe(lake, {"id": "e1", "at": "2026-01-01T00:00:00Z"})
    run(lake)
    feed_stripe(lake, {"id": "e2", "at": "2026-01-02T00:00:00Z", "subscription": {"price": "pro"}})
    feed_stripe(lake, {"id": "e3", "at": "2026-01-03T00:00:00Z", "subscription": {"price": "enterprise"}})
    slow = open_lake(lake.settings.model_copy(update={"batch_rows": 1}), Run("slow", "test"))
    run_table(slow, "billing.event_versions")
    run(lake, ["billing.subscription_history"])
    assert lake.vector("billing.subscription_history") == {("stripe", 0): 2}
    found = rows(lake, "SELECT plan FROM billing.subscription_history ORDER BY valid_from")
    assert [r["plan"] for r in found] == ["starter", "pro"]


def test_billing_counts_the_first_receipt_whatever_the_order_of_batches(tmp_path: Path) -> None:
    copies = [
        {"id": "e1", "at": "2026-01-01T00:00:00Z", "received": "2026-01-01T00:00:05Z", "subscription": {"price": "starter"}},
        {"id": "e1", "at": "2026-01-01T00:00:00Z", "received": "2026-01-01T00:00:09Z", "subscription": {"price": "pro"}},
        {"id": "e0", "at": "2026-01-01T00:00:00Z", "subscription": {"id": "sub_2"}},
    ]
    answers = []
    for number, order in enumerate([(0, 1, 2), (1, 0, 2), (2, 1, 0)]):
        lake = make(tmp_path / f"first{number}")
        for i in order:
            feed_stripe(lake, copies[i])
            run(lake)
        joined = "billing.subscriptions s JOIN billing.event_versions v ON v.object_id = s.subscription_id"
        answers.append(rows(lake, f"SELECT s.plan, v.recorded_at FROM {joined} ORDER BY ALL"))
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 2


def test_a_crm_rolled_back_gives_no_offset_twice(road: Lake) -> None:
    run(road)
    kept = road.load("raw.crm_workspaces").current_snapshot()
    assert kept is not None
    feed_crm(road, ("ws_2", "cus_2", "2026-01-02T00:00:00Z", "2026-01-02T00:00:00Z"))
    run(road)
    rollback_table(road, "raw.crm_workspaces", kept.snapshot_id)
    feed_crm(road, ("ws_3", "cus_3", "2026-01-03T00:00:00Z", "2026-01-03T00:00:00Z"))
    run(road)
    mapped = rows(road, "SELECT workspace_id FROM billing.workspace_customer_history ORDER BY workspace_id")
    assert [r["workspace_id"] for r in mapped] == ["ws_1", "ws_2", "ws_3"]


def test_dead_letters_cannot_be_rolled_back(road: Lake) -> None:
    """No position would bring them back."""
    feed_product(road, b"bad", received=RECEIVED)
    run(road)
    dead = road.load("ops.dead_letters").current_snapshot()
    assert dead is not None
    with pytest.raises(UsageError, match="no positions"):
        rollback_table(road, "ops.dead_letters", dead.snapshot_id)


def test_marts_read_a_consistent_cut(road: Lake) -> None:
    """The mart is held at what product.events has seen of billing, although the timeline is ahead of it."""
    feed_product(road, {"event_id": "a"}, received=RECEIVED)
    run(road)
    feed_stripe(road, {"id": "evt_2", "at": "2026-01-12T00:00:00Z", "subscription": {"price": "pro"}})
    ahead = [n for n in road.declarations if n.startswith("billing.")]
    run(road, ahead)
    timeline = road.load("billing.plan_timeline")
    feed_product(road, {"event_id": "b"}, received=RECEIVED)
    run(road, ["marts.upgrade_exposures"])
    inputs = history(road.load("marts.upgrade_exposures"))[0].summary.additional_properties["lakehouse.inputs"]  # type: ignore[union-attr]
    current = timeline.current_snapshot()
    assert current is not None
    assert str(current.snapshot_id) not in inputs, "the newer timeline was read although product.events had not seen it"
    run(road)
    inputs = history(road.load("marts.upgrade_exposures"))[0].summary.additional_properties["lakehouse.inputs"]  # type: ignore[union-attr]
    assert str(current.snapshot_id) in inputs
