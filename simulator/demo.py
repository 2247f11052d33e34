"""What the simulator offers to the `lakehouse` command: a world played into the lake, round by round."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from simulator.player import Player, Round
from simulator.truth import write_truth
from simulator.verify import verify
from simulator.world import TAIL_DAYS, WorldConfig, build_world

__all__ = ["play", "verify"]


class Services(Protocol):
    """Where to send to."""

    bootstrap: str
    product_topic: str
    webhook_url: str


class Clock:
    """Simulated time: the receiver reads it, the player sets it."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """Epoch seconds."""
        return self._now

    def set(self, now: float) -> None:
        """Move to `now`."""
        self._now = now


def play(
    folder: Path,
    services: Callable[[Callable[[], float]], AbstractContextManager[Services]],
    after_day: Callable[[datetime], None],
    after_round: Callable[[Services, datetime], None],
    *,
    webhook_secret: str,
    rounds: int,
    progress: Callable[[str, int, int], None],
    **config: Any,
) -> dict[str, Any]:
    """Play what was not played yet of the world of `config` (see WorldConfig), a simulated day at a time.

    `after_day` runs after each day (the CRM shows its present state only, so it is polled daily); `after_round` after each of
    `rounds` groups of days, and when it returns the days count as received: an interrupted run goes on behind them.

    Returns:
        {"rounds", "days", "customers", "posted", "produced", "crm_changes"}: what was sent by this call.

    Raises:
        JournalMismatchError: the folder holds another world.
    """
    wanted = WorldConfig(**config)
    days = wanted.days + TAIL_DAYS
    told: dict[str, Any] = {"rounds": 0, "days": 0, "customers": wanted.customers, "posted": 0, "produced": 0, "crm_changes": 0}
    if _played(folder, wanted, days):
        return told
    world = build_world(wanted)
    if not all((folder / name).exists() for name in ("truth/truth.json", "journal.json")):
        # without a journal nothing was sent: the truth there may be that of another world, whose demo ended this early
        progress("writing down the truth", 0, 0)
        write_truth(world, folder / "truth")
    clock = Clock()
    with (
        services(clock) as running,
        Player(
            world,
            folder,
            webhook_url=running.webhook_url,
            webhook_secret=webhook_secret,
            bootstrap_servers=running.bootstrap,
            product_topic=running.product_topic,
            set_clock=clock.set,
        ) as player,
    ):
        for group in _groups(player.pending(days), days, rounds):
            for day in group:
                progress(f"playing {day.start:%d %B}", day.number, days)
                report = player.deliver(day)
                after_day(day.end)
                told["posted"] += report.posted
                told["produced"] += report.produced
                told["crm_changes"] += report.crm_changes
            after_round(running, group[-1].end)
            for day in group:
                player.confirm(day)
            told["rounds"] += 1
            told["days"] += len(group)
    return told


def _played(folder: Path, config: WorldConfig, days: int) -> bool:
    """Whether the journal says that all of this world arrived: then it need not even be built."""
    path = folder / "journal.json"
    if not path.exists():
        return False
    journal = json.loads(path.read_text("utf-8"))
    return bool(journal["world"] == config.to_json() and journal["confirmed"] == journal["rounds"] == days)


def _groups(pending: list[Round], days: int, rounds: int) -> list[list[Round]]:
    """Days in as many groups as there are rounds, by their place in the whole world."""
    groups: dict[int, list[Round]] = {}
    for day in pending:
        groups.setdefault(day.number * rounds // days, []).append(day)
    return list(groups.values())
