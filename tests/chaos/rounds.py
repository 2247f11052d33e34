"""One round: records flow into a topic while writers are hurt in every way a seed can think of; then, left alone, they catch up.

What happens and roughly when follows from (seed, catalog, number), so a round can be replayed; the exact interleaving does not.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from confluent_kafka.admin import AdminClient
from pyiceberg.table import Table

from lakehouse.broker import ensure_topics
from lakehouse.failpoints import PLACES
from lakehouse.lake import history
from tests.chaos.odds import COMMIT_FAULTS, STORE_FAULTS
from tests.chaos.processes import Command, start
from tests.chaos.producer import Production, save
from tests.chaos.scene import Scene
from tests.chaos.verifier import verify

TABLE = "raw.product_events"
FOLLOW = ["ingest", "--follow", TABLE]
PARTITIONS = 4
WRITERS = 3
TICK_SECONDS = 0.02
ZOMBIE_SECONDS = 2.2  # longer than a writer may be silent before it loses its partitions
ENOUGH_HITS, PATIENCE = 3, 4  # a round goes on until so many failpoints came, so many times its length at most
CATCH_UP_SECONDS = 90.0
CATCH_UP_ATTEMPTS = 5

# Which action makes sense where. Taken in turn, so that each comes as often as any other.
FAILPOINTS = [
    *(f"{place}=kill" for place in PLACES),
    *(f"{place}=stop" for place in PLACES),
    "stage.begin=full",
    "commit.checked=full",
    "commit.ready=lost",  # before it landed
    "commit.answered=lost",  # after it landed
    "commit.ready=conflict",
    "commit.answered=conflict",  # refused, though it landed: what a client that sends twice is told
]


@dataclass
class Outcome:
    """What became of a round, as the report shows it."""

    catalog: str
    number: int
    seed: str
    records: int = 0
    seconds: float = 0.0
    verdict: dict[str, Any] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    failpoints: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    error: str = ""  # the round could not be judged: why

    @property
    def clean(self) -> bool:
        """Whether every record is in the table once, unchanged."""
        wrong = ("lost", "doubled", "unexpected", "changed", "broken")
        return not self.error and bool(self.verdict) and not any(self.verdict[kind] for kind in wrong)


class Round:
    """A round in the making; `play` is all there is to call.

    sabotage: what breaks each writer from within before it starts, to see that the verdict would say so.
    """

    def __init__(
        self, scene: Scene, seed: int, number: int, records: int, seconds: float, sabotage: Callable[[], None] | None = None
    ) -> None:
        self.scene, self.number, self.seconds, self.sabotage = scene, number, seconds, sabotage
        text = f"{seed}/{scene.kind}/{number}"
        self.dice = random.Random(text)
        self.outcome = Outcome(scene.kind, number, text, records)
        self.name = f"r{seed}-{number}"
        self.topic = f"chaos.{scene.kind}.{seed}.{number}.{time.time_ns()}"  # a replayed round must not meet its first self
        self.folder = scene.folder / f"round-{number}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.faulty, self.plain = scene.environments(self.name, self.topic)
        self.lake = scene.lake(self.plain)
        self.writers: list[Command] = []
        self.others: list[Command] = []
        self.wakes: list[tuple[float, Command]] = []  # when a stopped one goes on
        self.wanted = WRITERS
        self.started = 0
        self._began = time.monotonic()
        self._hits = self.folder / "failpoints.log"

    def play(self) -> Outcome:
        """Run the round to its verdict. Never raises: what went wrong with the round itself is in `Outcome.error`."""
        began = time.monotonic()
        wires_before = self.scene.wire_faults()
        try:
            ensure_topics(self.scene.kafka.bootstrap_servers, {self.topic: PARTITIONS}, timeout_seconds=30)
            self.lake.open_for_write(TABLE)
            log = self._faulty_part()
            save(log, self.folder / "produced.arrow")
            self._catch_up()
            self._judge(log)
        except Exception as error:
            self.outcome.error = f"{type(error).__name__}: {error}"
        finally:
            self._peace()
            self._end_all()
        self.outcome.faults.update(self.scene.wire_faults() - wires_before)
        if self._hits.exists():
            self.outcome.failpoints.update(self._hits.read_text("utf-8").splitlines())
        self.scene.leave(self.name, self.folder, self.outcome.clean)
        self.outcome.seconds = round(time.monotonic() - began, 2)
        return self.outcome

    # --- the faulty part ---------------------------------------------------------------------------------------------

    def _faulty_part(self) -> pa.Table:
        production = Production(
            self.scene.kafka.bootstrap_servers, self.topic, PARTITIONS, self.outcome.records, self.outcome.seed
        )
        events = sorted(self._plan(), key=lambda e: e[0])
        production.start()
        self._until_the_first_commit()
        self._began = time.monotonic()
        hits = 0
        while (now := self._now()) < self.seconds or (hits < ENOUGH_HITS and now < self.seconds * PATIENCE):
            while events and events[0][0] <= now:
                name, act = events.pop(0)[1:]
                if act() and name:  # what ends a fault has no name
                    self.outcome.faults[name] += 1
            self._tend(now)
            hits = self._hits.read_text("utf-8").count("\n") if self._hits.exists() else 0
            # there is something to commit until the end, however slow the machine is
            production.share = 0.05 + 0.9 * (min(1.0, now / self.seconds) + min(1.0, hits / ENOUGH_HITS)) / 2
            time.sleep(TICK_SECONDS)
        self._peace()
        return production.join()

    def _until_the_first_commit(self) -> None:
        """Faults before anything works would be all alike."""
        deadline = time.monotonic() + CATCH_UP_SECONDS
        while self.lake.load(TABLE).current_snapshot() is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no writer committed within {CATCH_UP_SECONDS:.0f} s: {[c.said for c in self.writers]}")
            self._tend(0.0)
            time.sleep(0.2)

    def _plan(self) -> list[tuple[float, str, Callable[[], bool]]]:
        """The events of the round: (when, name, what). One without a name ends another."""
        dice, end = self.dice, self.seconds
        at = lambda low=0.1, high=0.9: dice.uniform(low, high) * end  # noqa: E731 - a moment of the round
        plan: list[tuple[float, str, Callable[[], bool]]] = []

        def maybe(odds: float, name: str, act: Callable[[], bool], times: int = 1) -> None:
            plan.extend((at(), name, act) for _ in range(times) if dice.random() < odds)

        maybe(0.8, "kill", lambda: self._signal(signal.SIGKILL), 2)
        maybe(0.7, "leave", lambda: self._signal(signal.SIGTERM))
        maybe(0.7, "join", self._join)
        maybe(0.6, "maintain", self._maintain, 2)
        maybe(0.5, "rollback", self._rollback)
        maybe(0.4, "branch_write", self._write_to_a_branch)
        maybe(0.4, "foreign_commit", self._foreign_commit)
        if dice.random() < 0.6:
            plan.append((at(0.05, 0.4), "zombie", self._zombie))
        if dice.random() < 0.12:
            plan.append((at(0.2, 0.5), "broker_restart", self._restart_broker))
        elif dice.random() < 0.25:
            moment = at(0.2, 0.6)
            plan.append((moment, "broker_pause", partial(self._always, self.scene.kafka.pause)))
            plan.append((moment + dice.uniform(0.3, 1.5), "", partial(self._always, self.scene.kafka.resume)))
        if self.scene.small_disk and dice.random() < 0.5:
            moment = at(0.1, 0.6)
            plan.append((moment, "disk_full", self.scene.fill_disk))
            plan.append((moment + dice.uniform(0.2, 1.0), "", partial(self._always, self.scene.free_disk)))
        if self.scene.catalog and self.scene.store:
            commits = {name: dice.uniform(0.05, 0.25) for name in dice.sample(COMMIT_FAULTS, 3)} | {"slow": 0.1, "error": 0.05}
            requests = {name: dice.uniform(0.01, 0.06) for name in dice.sample(STORE_FAULTS, 3)}
            for name, wire, odds, chance in (
                ("catalog", self.scene.catalog, commits, 0.8),
                ("store", self.scene.store, requests, 0.6),
            ):
                if dice.random() < chance:
                    moment = at(0.0, 0.5)
                    plan.append(
                        (moment, f"{name}_window", partial(self._always, partial(wire.odds.set, odds, self.outcome.seed)))
                    )
                    plan.append((moment + dice.uniform(0.5, 2.0), "", partial(self._always, partial(wire.odds.set, {}))))
        return plan

    def _tend(self, now: float) -> None:
        """Keep the wanted number of writers running; wake those whose time has come, and any that stopped itself."""
        for due, command in list(self.wakes):
            if due <= now:
                self.wakes.remove((due, command))
                command.signal(signal.SIGCONT)
                command.paused = False
        for command in list(self.writers):
            if not command.running:
                self._ended(command)
                self.writers.remove(command)
            elif not command.paused and _stopped(command.pid):  # by a failpoint
                command.paused = True
                self.wakes.append((now + self.dice.choice((0.2, ZOMBIE_SECONDS)), command))
        while sum(not c.paused for c in self.writers) < self.wanted:  # a stopped one is taken for dead
            self._start_writer()

    def _start_writer(self) -> None:
        turn = self.number * 4 + self.started  # by number of the round, so that it can be replayed alone
        self.started += 1
        armed, call = "", None
        lot = self.dice.random()
        if lot < 0.75:
            armed = f"{FAILPOINTS[turn % len(FAILPOINTS)]}@{self.dice.choice((1, 1, 2, 3))}"
        elif lot < 0.9:
            call = self.dice.randrange(1, 400_000)
            self.outcome.faults["random_call"] += 1
        output = self.folder / f"writer-{self.started}.log"
        self.writers.append(start(self.scene.context, FOLLOW, self.faulty, output, armed, self._hits, call, self.sabotage))

    def _ended(self, command: Command) -> None:
        code = command.process.exitcode
        what = command.arguments[0]
        if code == -signal.SIGKILL:
            self.outcome.exits[f"{what} killed"] += 1
        elif code == 0:
            self.outcome.exits[f"{what} 0"] += 1
        else:
            lines = (
                [line for line in command.said.splitlines() if line.startswith("error:")]
                or command.said.splitlines()[-1:]
                or [""]
            )
            self.outcome.exits[f"{what} {code}: {lines[-1][:160]}"] += 1

    # --- events: each says whether it took place -------------------------------------------------------------------------

    def _pick(self) -> Command | None:
        awake = [c for c in self.writers if c.running and not c.paused]
        return self.dice.choice(awake) if awake else None

    def _signal(self, number: signal.Signals) -> bool:
        if (command := self._pick()) is None:
            return False
        command.signal(number)
        return True

    def _zombie(self) -> bool:
        """Stopped until the others have its partitions, then awake again with what it held."""
        if (command := self._pick()) is None:
            return False
        command.signal(signal.SIGSTOP)
        command.paused = True
        self.wakes.append((min(self.seconds * 0.95, self._now() + ZOMBIE_SECONDS), command))
        return True

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _join(self) -> bool:
        self.wanted += 1
        return True

    def _restart_broker(self) -> bool:
        self.scene.kafka.kill()
        self.scene.kafka.start()
        return True

    @staticmethod
    def _always(act: Callable[[], object]) -> bool:
        act()
        return True

    def _maintain(self) -> bool:
        return self._other("maintain", TABLE)

    def _rollback(self) -> bool:
        kept = history(self.lake.load(TABLE))
        if len(kept) < 2:
            return False
        target = self.dice.choice(kept[1:12])
        return self._other("rollback", TABLE, str(target.snapshot_id))

    def _other(self, *arguments: str) -> bool:
        output = self.folder / f"{arguments[0]}-{len(self.others)}.log"
        self.others.append(start(self.scene.context, arguments, self.faulty, output))
        return True

    def _write_to_a_branch(self) -> bool:
        """Rows on a branch, by another tool: they must neither count nor move a position."""
        table = self.lake.load(TABLE)
        current = table.current_snapshot()
        if current is None:
            return False
        return self._try(lambda: self._append_to_branch(table, current.snapshot_id))

    @staticmethod
    def _append_to_branch(table: Table, snapshot_id: int) -> None:
        if "audit" not in table.refs():
            table.manage_snapshots().create_branch(snapshot_id, "audit").commit()
        rows = table.scan(limit=3).to_arrow()
        table.append(rows, branch="audit")

    def _foreign_commit(self) -> bool:
        """Another tool changes a property: every commit on its way meets a real conflict."""
        table = self.lake.load(TABLE)
        return self._try(lambda: table.transaction().set_properties({"chaos": str(time.time_ns())}).commit_transaction())

    def _try(self, act: Callable[[], object]) -> bool:
        """Do it by another tool's means, which gives up at a conflict."""
        for _ in range(3):
            try:
                act()
            except Exception:
                continue
            return True
        return False

    # --- the end -------------------------------------------------------------------------------------------------------

    def _peace(self) -> None:
        """No fault from here on."""
        for wire in (self.scene.catalog, self.scene.store):
            if wire:
                wire.odds.set({})
        self.scene.free_disk()
        with contextlib.suppress(Exception):
            self.scene.kafka.resume()

    def _catch_up(self) -> None:
        """End the hurt writers (zombies wake first and do what they must not), then one that nobody hurts takes up the rest."""
        for command in self.writers + self.others:
            command.signal(signal.SIGCONT)
        for command in self.writers:
            command.signal(self.dice.choice((signal.SIGTERM, signal.SIGKILL)))
        for command in self.writers + self.others:
            if command.wait(20) is None:
                self.outcome.exits[f"{command.arguments[0]} had to be killed"] += 1
                command.signal(signal.SIGKILL)
                command.wait(10)
            self._ended(command)
        self.writers, self.others = [], []
        deadline = time.monotonic() + CATCH_UP_SECONDS
        for attempt in range(CATCH_UP_ATTEMPTS):
            last = start(self.scene.context, ["ingest", TABLE], self.plain, self.folder / f"last-{attempt}.log")
            self.others.append(last)
            code = last.wait(max(1.0, deadline - time.monotonic()))
            if code == 0:
                return
            self._ended(last)
            if code is None:
                raise RuntimeError(f"the last writer did not catch up within {CATCH_UP_SECONDS:.0f} s: {last.said}")
        raise RuntimeError(f"the last writer failed {CATCH_UP_ATTEMPTS} times: {last.said}")

    def _judge(self, log: pa.Table) -> None:
        """The verdict; and once more after maintenance without any guard, which nobody may be in the way of now."""
        for after in ("catching up", "maintenance"):
            if after == "maintenance":
                bold = self.plain | {"LAKEHOUSE_EXPIRED_FILES_HOURS": "0", "LAKEHOUSE_ORPHAN_HOURS": "0"}
                command = start(self.scene.context, ["maintain", TABLE], bold, self.folder / "maintain-last.log")
                self.others.append(command)
                if command.wait(CATCH_UP_SECONDS) != 0:
                    raise RuntimeError(f"maintenance failed with nobody in its way: {command.said}")
            location = self.lake.load(TABLE).metadata_location
            verdict = verify(log, location, self.scene.filesystem(self.plain))
            self.outcome.verdict = {"after": after, "metadata": location} | verdict.summary()
            if not verdict.clean:
                break
        (self.folder / "verdict.json").write_text(json.dumps(self.outcome.verdict, indent=1), "utf-8")

    def _end_all(self) -> None:
        for command in self.writers + self.others:
            command.signal(signal.SIGKILL)
            command.wait(10)
        with contextlib.suppress(Exception):
            admin = AdminClient({"bootstrap.servers": self.scene.kafka.bootstrap_servers, "log_level": 0})
            admin.delete_topics([self.topic])[self.topic].result(10)


def _stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):  # it is gone, or goes while its state is read
        return False
