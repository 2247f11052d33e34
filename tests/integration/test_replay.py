"""Replay of dead letters on a real lake: after a fix a record lands as if it had never been refused; its letter is closed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import lakehouse.replay
from lakehouse.errors import UsageError
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.ledger import read
from lakehouse.replay import replay
from lakehouse.runner import run
from lakehouse.settings import ROOT, Settings
from tests.feed import CLEAN, feed_crm, feed_product, feed_stripe, rows

RECEIVED = "2026-01-10T12:00:05Z"
TABLES = ("billing.event_versions", "billing.subscription_history", "billing.plan_timeline", *CLEAN)
LETTERS = 'SELECT consumer, "offset", reason, resolved_at IS NOT NULL AS resolved FROM ops.dead_letters ORDER BY ALL'


# a known type without an object id: no code can use it
BROKEN = {"id": "evt_broken", "at": "2026-01-07T00:00:00Z", "object": {"object": "charge", "amount": 1}}


def make(home: Path, code: Path | None = None) -> Lake:
    """A lake; with `code`, over declarations and transforms of its own."""
    own = {"catalog_dir": code / "catalog", "transforms_dir": code / "transforms"} if code else {}
    return open_lake(Settings(home=home, batch_rows=3, **own), Run("test", "test"))  # type: ignore[arg-type]


@pytest.fixture
def fixed(tmp_path: Path) -> Path:
    """Code that knows the status `dormant` and takes product events up to 60 days old."""
    code = tmp_path / "fixed"
    for folder in ("catalog", "transforms"):
        shutil.copytree(ROOT / folder, code / folder, ignore=shutil.ignore_patterns("__pycache__"))

    def edit(place: str, before: str, after: str) -> None:
        path = code / place
        assert before in path.read_text("utf-8")
        path.write_text(path.read_text("utf-8").replace(before, after), "utf-8")

    edit("catalog/columns.yaml", "unpaid, paused]\n", "unpaid, paused, dormant]\n")
    status = "- {status: dormant, billing_status: paused, preference: 5}\n"
    edit("catalog/reference/statuses.yaml", "- {status: canceled,", f"{status}- {{status: canceled,")
    edit("transforms/product/events.py", "too_late=timedelta(days=30)", "too_late=timedelta(days=60)")
    return code


def feed(lake: Lake) -> None:
    """cus_1 is active, then dormant (which is not known), then active again; events before, between and after."""
    states = [("01", "active", "pro"), ("05", "dormant", "pro"), ("08", "active", "enterprise")]
    for day, status, price in states:
        feed_stripe(
            lake, {"id": f"evt_{day}", "at": f"2026-01-{day}T00:00:00Z", "subscription": {"status": status, "price": price}}
        )
    feed_stripe(lake, BROKEN)
    feed_crm(lake, ("ws_1", "cus_1", "2025-01-01T00:00:00Z", "2025-01-01T00:00:00Z"))
    feed_product(
        lake,
        *({"event_id": f"e{d}", "occurred_at": f"2026-01-{d}T12:00:00Z"} for d in ("02", "06", "09")),
        {"event_id": "old", "occurred_at": "2025-12-01T12:00:00Z"},
        b"never json",
        received=RECEIVED,
    )


def content(lake: Lake) -> dict[str, Any]:
    found = {name: rows(lake, f"SELECT * FROM {name} ORDER BY ALL") for name in TABLES}
    # what was understood later is known later
    return {name: [{k: v for k, v in r.items() if k != "recorded_at"} for r in table] for name, table in found.items()}


def test_a_replay_moves_no_closed_day_and_nothing_that_was_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that does not understand a charge is mended in a later month; a replay that dies keeps the time at which it began."""
    code = tmp_path / "old"
    for folder in ("catalog", "transforms"):
        shutil.copytree(ROOT / folder, code / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = code / "transforms" / "billing" / "event_versions.py"
    odd = "        WHEN (state ->> '$.amount_minor') = '400' THEN 'not_understood'\n"
    before = "        WHEN object_type = 'subscription' AND (state"
    path.write_text(path.read_text("utf-8").replace(before, odd + before, 1), "utf-8")
    sales = [("evt_1", "2026-01-10", 1000), ("evt_2", "2026-01-11", 400), ("evt_3", "2026-03-20", 70)]
    feed_stripe(
        make(tmp_path / "home"),
        *(
            {"id": i, "type": "charge.succeeded", "at": f"{d}T10:00:00Z", "charge": {"id": f"ch_{i}", "amount": a}}
            for i, d, a in sales
        ),
    )
    tables = ("billing.event_versions", "billing.revenue_ledger")
    run(make(tmp_path / "home", code), tables)
    lake = make(tmp_path / "home")

    def january() -> list[Any]:
        at = datetime(2026, 3, 1, tzinfo=UTC)
        booked = read(lake, "booked", basis="cash", month=(2026, 1), grain="day")["rows"]
        return [booked, *(read(lake, r, basis="cash", at=at)["rows"] for r in ("booked", "as-known"))]

    told = january()
    assert [r["amount_minor"] for r in told[0]] == [1000]
    assert told[0][0]["closed"]
    began = datetime.now(UTC)
    with monkeypatch.context() as patch:
        patch.setattr(lakehouse.replay, "settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            replay(lake, "billing.event_versions")
    landed = rows(lake, "SELECT recorded_at, posting_date FROM billing.revenue_ledger WHERE amount_minor = 400")
    assert began <= landed[0]["recorded_at"] <= datetime.now(UTC)
    assert january() == told
    assert replay(lake, "billing.event_versions").resolved == 1
    assert rows(lake, "SELECT recorded_at, posting_date FROM billing.revenue_ledger WHERE amount_minor = 400") == landed
    assert rows(lake, "SELECT taken_up_at AS at FROM ops.dead_letters") == [{"at": landed[0]["recorded_at"]}]
    assert january() == told


def test_a_replay_gives_what_the_fixed_code_would_have_given_at_once(tmp_path: Path, fixed: Path) -> None:
    lake = make(tmp_path / "home")
    feed(lake)
    run(lake)
    events, versions = "product.events", "billing.event_versions"
    assert [(r["consumer"], r["offset"], r["reason"], r["resolved"]) for r in rows(lake, LETTERS)] == [
        (versions, 1, "unknown_status", False),
        (versions, 3, "incomplete_event", False),
        (events, 3, "too_late", False),
        (events, 4, "not_json", False),
    ]
    repaired = make(tmp_path / "home", fixed)
    billing = replay(repaired, versions)
    assert (billing.letters, billing.resolved, billing.refused, billing.gone) == (2, 1, {"incomplete_event": 1}, 0)
    assert billing.tables[0] == versions
    assert {"billing.subscription_history", events} < set(billing.tables)
    product = replay(repaired, events)
    assert (product.letters, product.resolved, product.refused) == (2, 1, {"not_json": 1})
    assert [(r["consumer"], r["offset"], r["reason"], r["resolved"]) for r in rows(repaired, LETTERS)] == [
        (versions, 1, "unknown_status", True),
        (versions, 3, "incomplete_event", False),
        (events, 3, "too_late", True),
        (events, 4, "not_json", False),
    ]
    # the event of the 6th, attributed long before, was repaired
    assert rows(repaired, "SELECT plan, billing_status FROM product.events WHERE event_id = 'e06'") == [
        {"plan": "pro", "billing_status": "paused"}
    ]
    at_once = make(tmp_path / "other", fixed)
    feed(at_once)
    run(at_once)
    assert content(repaired) == content(at_once)


def test_running_a_replay_twice_changes_nothing(tmp_path: Path, fixed: Path) -> None:
    feed(make(tmp_path / "home"))
    run(make(tmp_path / "home"))
    lake = make(tmp_path / "home", fixed)
    replay(lake, "billing.event_versions")
    before = content(lake)
    again = replay(lake, "billing.event_versions")
    assert (again.letters, again.resolved, again.refused) == (1, 0, {"incomplete_event": 1})
    run(lake)
    assert content(lake) == before


@pytest.mark.parametrize("dies_at", ["before the tables below", "before the letters are closed"])
def test_a_replay_that_dies_half_way_is_run_again(
    tmp_path: Path, fixed: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    feed(make(tmp_path / "home"))
    run(make(tmp_path / "home"))
    lake = make(tmp_path / "home", fixed)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if dies_at == "before the letters are closed":
            patch.setattr(lakehouse.replay, "settle", die)
        else:
            real = lakehouse.replay.take_up_again
            patch.setattr(lakehouse.replay, "take_up_again", lambda *a: die() if a[1] != "billing.event_versions" else real(*a))
        with pytest.raises(KeyboardInterrupt):
            replay(lake, "billing.event_versions")
    assert not any(r["resolved"] for r in rows(lake, LETTERS))
    run(lake)  # what runs meanwhile does not see the row that landed under its positions
    assert replay(lake, "billing.event_versions").resolved == 1
    replay(lake, "product.events")
    at_once = make(tmp_path / "other", fixed)
    feed(at_once)
    run(at_once)
    assert content(lake) == content(at_once)


def test_a_letter_that_is_refused_again_gets_the_reason_of_today(tmp_path: Path, fixed: Path) -> None:
    feed_stripe(make(tmp_path / "home"), {"id": "evt_1", "at": "2026-01-01T00:00:00Z", "subscription": {"status": "dormant"}})
    run(make(tmp_path / "home"))
    path = fixed / "transforms" / "billing" / "event_versions.py"
    path.write_text(path.read_text("utf-8").replace("'unknown_status'", "'status_not_understood'"), "utf-8")
    (fixed / "catalog" / "reference" / "statuses.yaml").write_bytes((ROOT / "catalog/reference/statuses.yaml").read_bytes())
    assert replay(make(tmp_path / "home", fixed), "billing.event_versions").refused == {"status_not_understood": 1}
    letter = rows(make(tmp_path / "home", fixed), "SELECT reason, replayed_at, resolved_at FROM ops.dead_letters")[0]
    assert letter["reason"] == "status_not_understood"
    assert letter["replayed_at"] is not None
    assert letter["resolved_at"] is None


def test_letters_are_chosen_by_reason_and_time(tmp_path: Path, fixed: Path) -> None:
    lake = make(tmp_path / "home")
    feed(lake)
    run(lake)
    repaired = make(tmp_path / "home", fixed)
    versions = "billing.event_versions"
    assert replay(repaired, versions, reason="not_json").letters == 0
    assert replay(repaired, versions, until=datetime(2026, 1, 5, tzinfo=UTC)).letters == 0
    assert (
        replay(repaired, versions, since=datetime(2026, 1, 5, tzinfo=UTC), until=datetime(2026, 1, 6, tzinfo=UTC)).resolved == 1
    )


def test_a_record_that_raw_no_longer_holds_keeps_its_letter(tmp_path: Path, fixed: Path) -> None:
    lake = make(tmp_path / "home")
    feed(lake)
    run(lake)
    table = lake.load("raw.stripe_events")
    table.delete("received_at < '2026-01-06T00:00:00+00:00'")  # as retention drops whole partitions
    done = replay(make(tmp_path / "home", fixed), "billing.event_versions")
    assert (done.letters, done.gone, done.resolved) == (2, 1, 0)


@pytest.mark.parametrize("name", ["billing.plan_timeline", "raw.stripe_events", "ops.dead_letters"])
def test_only_tables_that_read_raw_records_have_letters(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"takes no records from raw.*billing.event_versions"):
        replay(make(tmp_path / "home"), name)


def test_progress_is_told(tmp_path: Path, fixed: Path) -> None:
    lake = make(tmp_path / "home")
    feed(lake)
    run(lake)
    told: list[tuple[str, int, int]] = []
    say: Callable[[str, int, int], None] = lambda *what: told.append(what)  # noqa: E731
    replay(make(tmp_path / "home", fixed), "product.events", on_step=say)
    assert told[-1] == ("product.events", 2, 2)


def test_a_conflicting_copy_stays_one_however_often_it_is_replayed(tmp_path: Path) -> None:
    lake = make(tmp_path / "home")
    for batch, email in enumerate(("a@example.com", "b@example.com")):
        body = {"id": "cus_1", "object": "customer", "email": email}
        event = {"id": "evt_1", "at": "2026-01-01T00:00:00Z", "type": "customer.created", "object": body}
        feed_stripe(lake, event | {"received": f"2026-01-01T00:0{batch}:00Z"})
        run(lake)
    before = content(lake)
    assert replay(lake, "billing.event_versions").refused == {"conflicting_copy": 1}
    assert [(r["offset"], r["reason"], r["resolved"]) for r in rows(lake, LETTERS)] == [(1, "conflicting_copy", False)]
    assert content(lake) == before
