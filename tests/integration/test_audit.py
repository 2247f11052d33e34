"""The audit finds what is wrong, agrees with all that is right, and says of neither who it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from prometheus_client import REGISTRY

from lakehouse import jobs
from lakehouse.audit import Audited, audit, audits
from lakehouse.errors import ChecksFailed, DeclarationError, UsageError
from lakehouse.lake import Lake, Run, history, open_lake
from lakehouse.runner import run
from lakehouse.settings import Settings
from lakehouse.transforms import load_transforms, with_inputs
from tests.feed import feed_crm, feed_members, feed_product, feed_stripe, rewritten, rows

EVENTS = "product.events"
SINCE = "2025-12-01T00:00:00Z"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an event of every kind: each way to a workspace, each outcome, changes at the second, what is learnt late."""
    home = tmp_path_factory.mktemp("audited") / "home"
    lake = open_lake(Settings(home=home), Run("test", "test"))
    for number, (at, price) in enumerate((("2026-01-01T00:00:00Z", "starter"), ("2026-01-09T00:00:00Z", "pro"))):
        feed_stripe(lake, {"id": f"evt_{number}", "at": at, "subscription": {"price": price}})
    feed_crm(lake, ("ws_1", "cus_1", SINCE, SINCE), ("ws_2", "cus_9", SINCE, SINCE))
    feed_crm(lake, ("ws_3", "cus_1", SINCE, SINCE), ("ws_3", "cus_9", "2026-01-08T00:00:00Z", "2026-01-08T00:00:00Z"))
    # entered later, for earlier: what was said of that time and after holds no more
    feed_crm(lake, ("ws_3", "cus_1", "2026-01-07T00:00:00Z", "2026-01-09T00:00:00Z"))
    feed_crm(lake, ("ws_4", "cus_1", SINCE, SINCE), ("ws_4", None, "2026-01-09T00:00:00Z", "2026-01-09T00:00:00Z"))
    feed_crm(lake, ("ws_5", "cus_1", SINCE, SINCE), mapping="a")
    feed_crm(lake, ("ws_5", "cus_9", "2026-01-05T00:00:00Z", "2026-01-05T00:00:00Z"), mapping="b")
    feed_members(
        lake,
        ("u_1", "ws_1", SINCE, SINCE),
        ("u_1", "ws_1", "2026-01-06T00:00:00Z", "2026-01-06T00:00:00Z", True),
        ("u_1", "ws_3", "2026-01-06T00:00:00Z", "2026-01-06T00:00:00Z"),
        ("u_2", "ws_1", SINCE, SINCE),
        ("u_2", "ws_2", "2026-01-08T00:00:00Z", "2026-01-08T00:00:00Z"),
        ("u_3", "ws_5", SINCE, SINCE),
    )
    hours = [f"2026-01-{day:02}T{hour:02}:00:00Z" for day in range(1, 11) for hour in (0, 12)]
    known: dict[str, object] = {"event_name": "identify", "anonymous_id": "an_1", "workspace_id": ...}
    whose: list[dict[str, object]] = [
        *({"workspace_id": f"ws_{n}"} for n in range(1, 7)),
        *({"workspace_id": ..., "user_id": f"u_{n}"} for n in range(1, 5)),
        *({"workspace_id": ..., "user_id": ..., "anonymous_id": an} for an in ("an_1", "an_2", ...)),
    ]
    events = [w | {"event_id": f"{n}-{at}", "occurred_at": at} for n, w in enumerate(whose) for at in hours]
    for number in (0, 1):
        login = {
            "event_id": f"login{number}",
            "user_id": f"u_{number + 1}",
            "occurred_at": f"2026-01-0{4 + 3 * number}T00:00:00Z",
        }
        feed_product(lake, *events[number::2], known | login, received=f"2026-01-1{number}T12:00:00Z")
        run(lake, with_inputs([EVENTS], lake.declarations, load_transforms(lake.settings.transforms_dir, lake.declarations)))
    return home


@pytest.fixture
def lake(filled: Path) -> Iterator[Lake]:
    """The lake, put back as it was after the test."""
    lake = open_lake(Settings(home=filled), Run("test", "test"))
    before = lake.load(EVENTS).metadata_location
    yield lake
    lake.catalog.drop_table(EVENTS)
    lake.catalog.register_table(EVENTS, before)


def audited(lake: Lake, **options: int) -> Audited:
    return audit(lake, "attribution", **{"sample": 1_000, "days": 365} | options)  # type: ignore[arg-type]


def test_what_is_right_agrees(lake: Lake) -> None:
    found = audited(lake)
    assert (found.checked, found.agree, found.share, found.examples) == (262, 262, 1.0, [])
    counted = rows(lake, "SELECT attribution, count(*) AS n FROM product.events GROUP BY ALL")
    assert {o: v.rows for o, v in found.outcomes.items()} == {r["attribution"]: r["n"] for r in counted}
    assert all(v.checked == v.agree == v.rows > 0 for v in found.outcomes.values())
    assert len(found.outcomes) == 4
    ways = rows(lake, "SELECT DISTINCT workspace_source AS way FROM product.events WHERE attribution = 'resolved'")
    assert {r["way"] for r in ways} == {"sent", "membership", "identity"}


FORGED: dict[str, Callable[[pl.Expr], dict[str, pl.Expr]]] = {
    "plan": lambda it: {"plan": pl.when(it).then(pl.lit("enterprise")).otherwise("plan")},
    "attributed_workspace_id": lambda it: {
        "attributed_workspace_id": pl.when(it).then(pl.lit("ws_9")).otherwise("attributed_workspace_id")
    },
    "subscription_id": lambda it: {"subscription_id": pl.when(~it).then("subscription_id")},
}


@pytest.mark.parametrize("column", FORGED)
def test_a_row_that_is_wrong_is_found_and_told_by_its_place(lake: Lake, column: str) -> None:
    one = rows(lake, "SELECT event_id, * FROM product.events WHERE attribution = 'resolved' ORDER BY hash(event_id) LIMIT 1")[0]
    rewritten(lake, EVENTS, lambda r: r.with_columns(**FORGED[column](pl.col("event_id") == one["event_id"])))
    found = audited(lake)
    assert (found.checked, found.agree) == (262, 261)
    (example,) = found.examples
    assert {c: example[c] for c in ("topic", "partition", "offset")} == {c: one[c] for c in ("topic", "partition", "offset")}
    told = {"stored": "enterprise", "derived": one["plan"]}
    assert example["differs"] == {column: told if column == "plan" else {}}  # ids are personal: not told
    assert one["event_id"] not in json.dumps(example, default=str)
    assert found.outcomes["resolved"].checked - found.outcomes["resolved"].agree == 1
    assert REGISTRY.get_sample_value("lakehouse_audit_agreement", {"audit": "attribution"}) == pytest.approx(261 / 262)


def test_what_was_learnt_and_not_taken_up_disagrees_until_it_is(lake: Lake) -> None:
    before = {name: lake.load(name).metadata_location for name in ("raw.crm_workspaces", EVENTS)}
    feed_crm(lake, ("ws_6", "cus_1", SINCE, "2026-01-12T00:00:00Z"))
    assert audited(lake).agree == 262 - 20
    for name, location in before.items():
        lake.catalog.drop_table(name)
        lake.catalog.register_table(name, location)


def test_the_tables_can_be_audited_as_they_were(lake: Lake) -> None:
    first = history(lake.load(EVENTS))[-1]
    found = audit(lake, "attribution", sample=1_000, days=365, as_of=first.snapshot_id)
    assert (found.checked, found.share) == (131, 1.0)


def test_the_seed_picks_the_sample_and_the_window_bounds_it(lake: Lake) -> None:
    day = {"since": datetime(2026, 1, 3, tzinfo=UTC), "until": datetime(2026, 1, 4, tzinfo=UTC)}
    found = audit(lake, "attribution", sample=1_000, **day)  # type: ignore[arg-type]
    assert found.checked == sum(v.rows for v in found.outcomes.values()) == 26
    mostly = [{o: v.checked for o, v in audited(lake, sample=50, seed=seed).outcomes.items()} for seed in (1, 1, 2)]
    assert mostly[0] == mostly[1]
    assert len({json.dumps(m) for m in mostly}) > 1
    assert all(sum(m.values()) == 50 for m in mostly)
    with pytest.raises(UsageError, match="nothing to audit"):
        audit(lake, "attribution", sample=1, since=datetime(2027, 1, 1, tzinfo=UTC))
    with pytest.raises(UsageError, match="there is no audit 'plans'; there are: attribution"):
        audit(lake, "plans", sample=1)


def test_the_nightly_job_fails_when_too_little_agrees(lake: Lake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAKEHOUSE_HOME", str(lake.settings.home))
    monkeypatch.setenv("LAKEHOUSE_METRICS_FILE", str(tmp_path / "audit.prom"))
    assert jobs.audit("attribution")["share"] == 1.0
    assert 'lakehouse_audit_outcome_share{audit="attribution",outcome="resolved"}' in (tmp_path / "audit.prom").read_text()
    rewritten(lake, EVENTS, lambda r: r.with_columns(plan=pl.lit("pro")))
    with pytest.raises(ChecksFailed, match=r"product.events: \d+ of 262 rows agree; see: lakehouse audit attribution --seed"):
        jobs.audit("attribution")


def test_an_audit_declared_wrongly_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("table: product.events")
    with pytest.raises(DeclarationError, match=r"mine\.yaml: Object missing required field"):
        audits(tmp_path)
    (tmp_path / "mine.yaml").write_text("{table: t, about: a, time: t, outcome: o, given: [], compared: []}")
    with pytest.raises(DeclarationError, match=r"its query mine\.sql is not there"):
        audits(tmp_path)
