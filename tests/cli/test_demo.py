"""`lakehouse demo`: from nothing to a verified lake; again, interrupted, killed, beside another, over another world."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import SMALL, SMALLEST, Ran, brokers_of, finish, start, wait_for

from simulator.truth import write_truth
from simulator.world import WorldConfig, build_world


def snapshots(call: Callable[..., Ran], home: Path) -> dict[str, list[int]]:
    tables = [row["table"] for row in call("status", "--json").fine().json]
    shown = {t: call("show", t, "--json").json for t in tables}
    return {t: [s["snapshot_id"] for s in found["snapshots"]] for t, found in shown.items()}


def test_it_fills_the_lake_and_says_that_it_agrees_with_the_truth(demo_run: tuple[Path, Ran]) -> None:
    home, ran = demo_run
    said = ran.fine().out
    assert "Played 24 days of 40 customers in 2 rounds" in said
    assert "all of it agrees" in said
    assert "lakehouse sql" in said.splitlines()[-2]  # what to do next, in one line to be copied
    assert said.splitlines()[-2].endswith('LIMIT 5"')
    assert "product.events" in said
    assert brokers_of(home) == []
    assert not (home / "run" / "services.json").exists()


def test_again_it_sends_nothing_and_changes_nothing(call: Callable[..., Ran], world: Path) -> None:
    before = snapshots(call, world)
    assert [table for table, kept in before.items() if not kept] == ["ops.reconciliation_drift"]  # nothing asked Stripe
    again = call("demo", *SMALL).fine()
    assert "nothing was sent, and nothing changed" in again.out
    assert "all of it agrees" in again.out
    assert snapshots(call, world) == before


def test_another_world_in_the_same_home_is_refused(call: Callable[..., Ran], world: Path) -> None:
    refused = call("demo", *SMALL, "--seed", "8").failed(2, "belongs to another world (different: seed)")
    assert len(refused.err.splitlines()) <= 3
    assert call("verify").fine()


@dataclass(frozen=True)
class Interrupted:
    """A demo stopped by Ctrl-C, one killed while another tried to start, and one left alone, all over the same home."""

    home: Path
    stopped: Ran
    seconds_to_stop: float
    brokers_after_stop: list[int]
    running: list[int]
    beside: Ran
    killed: int
    brokers_after_kill: list[int]
    confirmed_when_killed: int
    last: Ran


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    home = tmp_path_factory.mktemp("interrupted") / "home"
    journal = home / "world" / "journal.json"
    # what another demo left that was stopped before it sent anything
    write_truth(build_world(WorldConfig(customers=21, days=20, product_events=1000, seed=1)), home / "world" / "truth")

    def confirmed() -> int:
        return int(json.loads(journal.read_text())["confirmed"]) if journal.exists() else 0

    first = start(home, "demo", *SMALLEST)
    wait_for(lambda: (home / "run" / "services.json").exists() and journal.exists(), first)
    asked = time.monotonic()
    first.send_signal(signal.SIGINT)
    stopped = finish(first)
    seconds = time.monotonic() - asked
    after_stop = brokers_of(home)

    second = start(home, "demo", *SMALLEST)
    wait_for(lambda: brokers_of(home) != [], second)
    running = brokers_of(home)
    beside = finish(start(home, "demo", *SMALLEST))
    wait_for(lambda: confirmed() > 0, second)
    second.kill()
    killed = finish(second).code
    deadline = time.monotonic() + 5
    while brokers_of(home) and time.monotonic() < deadline:  # the kernel ends it, a moment later
        time.sleep(0.02)
    after_kill, reached = brokers_of(home), confirmed()
    last = finish(start(home, "demo", *SMALLEST, "--json"))
    return Interrupted(home, stopped, seconds, after_stop, running, beside, killed, after_kill, reached, last)


def test_ctrl_c_stops_it_at_once_and_says_what_stays(interrupted: Interrupted) -> None:
    interrupted.stopped.failed(130, "stopped; what was committed stays")
    assert interrupted.seconds_to_stop < 10  # 1 s, on a machine that has nothing else to do
    assert interrupted.brokers_after_stop == []


def test_two_at_once_are_refused(interrupted: Interrupted) -> None:
    interrupted.beside.failed(2, "another lakehouse command works on", str(interrupted.home), "LAKEHOUSE_HOME")


def test_killed_it_leaves_no_broker_and_goes_on_where_it_was(interrupted: Interrupted) -> None:
    assert len(interrupted.running) == 1
    assert interrupted.killed == -signal.SIGKILL
    assert interrupted.brokers_after_kill == []
    assert 0 < interrupted.confirmed_when_killed < 24
    told = interrupted.last.fine().json
    assert told["played"]["days"] == 24 - interrupted.confirmed_when_killed
    for section in ("product_events", "stripe_events"):
        assert (told["verify"][section]["missing"], told["verify"][section]["duplicated"]) == (0, 0)
    assert told["verify"]["problems"] == []
    assert not (interrupted.home / "run" / "services.json").exists()
