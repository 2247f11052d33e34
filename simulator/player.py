"""Plays a world over real HTTP, Kafka and SQLite, round by round, and remembers which rounds arrived.

A round is a slice of simulated time. It counts as done only when `confirm` is called, after the lake committed it; a player
over the same folder goes on behind the last confirmed round. What was delivered and not confirmed is delivered again: the
receiving side has to take every record at least once anyway.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import polars as pl
from confluent_kafka import KafkaError, KafkaException, Producer

from simulator.chance import generator
from simulator.events import BURST_SECONDS, Delivery
from simulator.webhooks import WebhookSender
from simulator.workspaces import CrmChange, MembershipChange
from simulator.world import World

FLUSH_SECONDS = 60.0
_HEADERS: list[tuple[str, str | bytes | None]] = [("content-type", b"application/json")]
_CREATE_CRM = """
CREATE TABLE IF NOT EXISTS workspaces (
  workspace_id TEXT,
  mapping_id TEXT,
  stripe_customer_id TEXT,
  effective_at TEXT,
  updated_at TEXT,
  deleted INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (workspace_id, mapping_id)
);
CREATE TABLE IF NOT EXISTS memberships (
  user_id TEXT,
  workspace_id TEXT,
  role TEXT,
  effective_at TEXT,
  updated_at TEXT,
  deleted INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (user_id, workspace_id)
);"""
_WRITE_WORKSPACE = """
INSERT INTO workspaces (workspace_id, mapping_id, stripe_customer_id, effective_at, updated_at, deleted)
VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (workspace_id, mapping_id) DO UPDATE SET stripe_customer_id = excluded.stripe_customer_id,
  effective_at = excluded.effective_at, updated_at = excluded.updated_at, deleted = excluded.deleted"""
_WRITE_MEMBERSHIP = """
INSERT INTO memberships (user_id, workspace_id, role, effective_at, updated_at, deleted) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (user_id, workspace_id) DO UPDATE SET role = excluded.role,
  effective_at = excluded.effective_at, updated_at = excluded.updated_at, deleted = excluded.deleted"""

Progress = Callable[[str, int, int], None]


class JournalMismatchError(ValueError):
    """The folder holds the journal of another world, or of other rounds."""


class ProduceError(RuntimeError):
    """Kafka did not take every product record of a round."""


@dataclass(frozen=True, slots=True)
class Round:
    """The slice [start, end) of simulated time (UTC), `number` counted from 0."""

    number: int
    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What a round sent: POST requests (repeated ones included), accepted webhooks, Kafka records, CRM rows written."""

    posted: int
    accepted: int
    produced: int
    crm_changes: int


class Player:
    """Sends a world's rounds. Close it, or use it as a context manager."""

    def __init__(
        self,
        world: World,
        folder: Path,
        *,
        webhook_url: str,
        webhook_secret: str,
        bootstrap_servers: str,
        product_topic: str,
        set_clock: Callable[[float], None],
        progress: Progress | None = None,
        connections: int = 8,
        producer: Producer | None = None,
        withhold: Collection[str] = (),
    ) -> None:
        """`folder` gets `crm.db` and `journal.json`; it may hold those of the same world already.

        `set_clock(t)` sets the receiver's clock (epoch seconds, simulated) before each burst of webhooks.
        `progress(what, done, total)` is told about `stripe`, `crm` and `product`. `producer` replaces the Kafka producer.
        `withhold`: ids of Stripe events that are never delivered.

        Raises:
            JournalMismatchError: when the folder belongs to another world.
        """
        self._world, self._folder = world, folder
        self._topic, self._servers = product_topic, bootstrap_servers
        self._set_clock, self._progress = set_clock, progress or (lambda *_: None)
        self._url, self._secret, self._connections = webhook_url, webhook_secret, connections
        self._sender: WebhookSender | None = None
        self._producer = producer
        self._failures: list[str] = []
        self._closed = False
        self._deliveries = [d for d in world.stripe_deliveries if d.event_id not in withhold]
        self._delivery_times = [delivery.deliver_at for delivery in self._deliveries]
        self._change_times = [change.visible_at for change in world.crm_changes]
        self._membership_times = [change.visible_at for change in world.membership_changes]
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = self._read_journal()
        self._write_journal()
        with closing(self._crm()) as crm, crm:
            crm.executescript(_CREATE_CRM)

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections to the receiver, and wait for no answer of the broker any more."""
        self._closed = True
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        self._producer = None  # its threads end with it; left open they would complain of a broker that stops

    # Rounds and the journal

    def rounds(self, n: int) -> list[Round]:
        """The world's time in `n` equal slices, from `world.start` to `world.end`.

        Raises:
            JournalMismatchError: when the folder's confirmed rounds were cut otherwise.
        """
        if n < 1:
            raise ValueError("at least one round is needed")
        cut = self._journal["rounds"]
        if self._journal["confirmed"] and cut != n:
            raise JournalMismatchError(
                f"{self._folder}: the world was begun in {cut} rounds, not {n}. Run `make clean`, or use another home."
            )
        start, whole = self._world.start, self._world.end - self._world.start
        edges = [start + (whole * number / n) for number in range(n)] + [self._world.end]
        edges = [edge.replace(microsecond=edge.microsecond // 1000 * 1000) for edge in edges]  # whole milliseconds
        self._journal["rounds"] = n
        return [Round(number, edges[number], edges[number + 1]) for number in range(n)]

    def pending(self, n: int) -> list[Round]:
        """The rounds of `rounds(n)` that are not confirmed yet."""
        return self.rounds(n)[self._journal["confirmed"] :]

    def confirm(self, round_: Round) -> None:
        """The lake has this round: never send it again. Rounds are confirmed in order; a confirmed one again is no error."""
        confirmed = self._journal["confirmed"]
        if round_.number > confirmed:
            raise ValueError(f"round {round_.number} cannot be confirmed before round {confirmed}")
        self._journal["confirmed"] = max(confirmed, round_.number + 1)
        self._write_journal()

    def _read_journal(self) -> dict[str, Any]:
        path, config = self._folder / "journal.json", self._world.config.to_json()
        if not path.exists():
            return {"world": config, "rounds": None, "confirmed": 0}
        journal: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if journal["world"] != config:
            names = sorted(name for name in config if journal["world"].get(name) != config[name])
            raise JournalMismatchError(
                f"{path} belongs to another world (different: {', '.join(names)}). Run `make clean`, or use another home."
            )
        return journal

    def _write_journal(self) -> None:
        path = self._folder / "journal.json"
        temporary = path.with_suffix(".json.new")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(self._journal, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    # Delivery

    def deliver(self, round_: Round) -> RoundReport:
        """Send a round: its webhooks and CRM changes, and beside them its product records. Returns when all are acknowledged.

        Raises:
            DeliveryError: a webhook was refused or not accepted.
            ProduceError: Kafka did not take a record.
        """
        with ThreadPoolExecutor(1) as other:  # Stripe and the clients do not wait for each other
            produced = other.submit(self._produce, round_)
            posted, accepted = self._post(round_)
            changes = self._write_crm(round_)
            return RoundReport(posted, accepted, produced.result(), changes)

    def _post(self, round_: Round) -> tuple[int, int]:
        if self._sender is None:
            self._sender = WebhookSender(self._url, self._secret, self._connections)
        due = _between(self._delivery_times, round_.start.timestamp(), round_.end.timestamp())
        deliveries = self._deliveries[due]
        posted = accepted = 0
        for clock, burst in bursts(deliveries, self._world.config.seed):
            self._set_clock(clock)
            sent = self._sender.post([(delivery.event_id, delivery.body) for delivery in burst], int(clock))
            posted, accepted = posted + sent.attempts, accepted + sent.accepted
            self._progress("stripe", accepted, len(deliveries))
        return posted, accepted

    def _crm(self) -> sqlite3.Connection:
        return sqlite3.connect(self._folder / "crm.db", timeout=30.0)

    def _write_crm(self, round_: Round) -> int:
        changes = self._world.crm_changes[_between(self._change_times, round_.start, round_.end)]
        members = self._world.membership_changes[_between(self._membership_times, round_.start, round_.end)]
        with closing(self._crm()) as crm, crm:
            mapped = [(c.workspace_id, c.mapping_id, c.stripe_customer_id, *_row_state(c)) for c in changes]
            crm.executemany(_WRITE_WORKSPACE, mapped)
            crm.executemany(_WRITE_MEMBERSHIP, [(c.user_id, c.workspace_id, c.role, *_row_state(c)) for c in members])
        written = len(changes) + len(members)
        self._progress("crm", written, written)
        return written

    def _produce(self, round_: Round) -> int:
        producer = self._kafka()
        from_ms, to_ms = (round(edge.timestamp() * 1000) for edge in (round_.start, round_.end))
        records = self._world.product_records
        total = records.received_at.search_sorted(to_ms) - records.received_at.search_sorted(from_ms)
        done = 0
        for table in records.slices(from_ms, to_ms):
            frame: Any = pl.from_arrow(table)
            columns = (frame[name].to_list() for name in ("key", "payload", "received_at"))
            for key, payload, received in zip(*columns, strict=True):
                try:
                    producer.produce(self._topic, payload, key, timestamp=received, headers=_HEADERS)
                except BufferError:  # the queue is full: wait until the broker has taken some of it
                    producer.poll(1.0)
                    producer.produce(self._topic, payload, key, timestamp=received, headers=_HEADERS)
            producer.poll(0)
            done += frame.height
            self._progress("product", done, total)
        left = self._flush(producer)
        if left or self._failures:
            failures, self._failures = self._failures, []
            why = failures[0] if failures else f"no answer within {FLUSH_SECONDS:.0f} s"
            raise ProduceError(
                f"round {round_.number}: {left + len(failures)} of {total} records did not reach {self._topic}: {why}"
            )
        return done

    def _flush(self, producer: Producer) -> int:
        """Wait until the broker has answered for all records; how many are left after FLUSH_SECONDS, or when the player closes.

        Ctrl-C while this thread is being started leaves it to itself: nobody waits for it, and the broker stops before it ends.
        """
        deadline = time.monotonic() + FLUSH_SECONDS
        while (left := producer.flush(0.5)) and not self._closed and time.monotonic() < deadline:
            pass
        return left

    def _kafka(self) -> Producer:
        if self._producer is None:
            self._producer = Producer(
                {
                    "bootstrap.servers": self._servers,
                    "acks": "all",
                    "enable.idempotence": True,
                    "compression.type": "lz4",
                    "linger.ms": 20,
                    "queue.buffering.max.messages": 100_000,
                    "queue.buffering.max.kbytes": 131_072,
                    "delivery.report.only.error": True,  # else a Python call for each record, 1 us
                    "on_delivery": self._not_delivered,
                }
            )
        return self._producer

    def _not_delivered(self, error: KafkaError | None, _message: object) -> None:
        if error is not None:
            self._failures.append(str(KafkaException(error)))


def bursts(deliveries: Sequence[Delivery], seed: int) -> Iterator[tuple[float, list[Delivery]]]:
    """Deliveries (sorted by time) in groups of the same half hour, each with its clock and in shuffled order.

    The clock is the group's last delivery, so that nothing is received before it was created.
    """
    for window, group in groupby(deliveries, lambda delivery: int(delivery.deliver_at // BURST_SECONDS)):
        burst = list(group)
        clock = burst[-1].deliver_at
        generator(seed, f"burst/{window}").shuffle(burst)
        yield clock, burst


def _row_state(change: CrmChange | MembershipChange) -> tuple[str, str, int]:
    """effective_at, updated_at, deleted: a row is written when it becomes visible."""
    return change.effective_at.isoformat(), change.visible_at.isoformat(), int(change.deleted)


def _between(times: Sequence[Any], start: Any, end: Any) -> slice:
    return slice(bisect_left(times, start), bisect_left(times, end))
