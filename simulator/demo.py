"""What the simulator offers to the `lakehouse` command: a world played into the lake, round by round."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from simulator.account import KEPT_DAYS, Account
from simulator.api import Faults, StripeApi
from simulator.chance import generator
from simulator.player import Player, Round
from simulator.truth import write_truth
from simulator.verify import first_attribution, verify
from simulator.world import TAIL_DAYS, World, WorldConfig, build_world

__all__ = ["first_attribution", "play", "stripe_api", "verify"]


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
    withhold: int = 0,
    progress: Callable[[str, int, int], None],
    **config: Any,
) -> dict[str, Any]:
    """Play what was not played yet of the world of `config` (see WorldConfig), a simulated day at a time.

    `after_day` runs after each day (the CRM shows its present state only, so it is polled daily); `after_round` after each of
    `rounds` groups of days, and when it returns the days count as received: an interrupted run goes on behind them.
    `withhold`: so many of the last days' Stripe events are never delivered, for a reconciliation to find.

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
        write_truth(world, folder / "truth", withheld(world, withhold))
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
            withhold=withheld(world, withhold),
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


def withheld(world: World, number: int) -> frozenset[str]:
    """Ids of `number` live-mode events that the Events API still lists when the world has ended, chosen by the world's seed."""
    reach = world.end.timestamp() - (KEPT_DAYS - 1) * 86_400
    able = [event.id for event in world.stripe_events if event.livemode and event.created >= reach]
    return frozenset(generator(world.config.seed, "withheld").sample(able, min(number, len(able))))


API_KEY = "sk_live_simulated"


@contextmanager
def stripe_api(folder: Path, *, port: int, **faults: Any) -> Iterator[tuple[str, str]]:
    """Serve the Stripe account of the world played in `folder`, as it stands at the world's end; gives (URL, API key).

    faults: see simulator.api.Faults.
    """
    told = json.loads((folder / "journal.json").read_text("utf-8"))["world"]
    world = build_world(WorldConfig(**told | {"start": datetime.fromisoformat(told["start"])}))
    end = world.end.timestamp()
    with StripeApi({None: Account(world.stripe_events)}, lambda: end, [API_KEY], Faults(**faults), port=port) as api:
        yield api.url, API_KEY


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
