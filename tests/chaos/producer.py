"""What goes into Kafka, and the producer's own log of it: what the broker's delivery reports acknowledged, and nothing else."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from confluent_kafka import Message, Producer
from pyarrow import feather

from tests.chaos.verifier import LOG_SCHEMA

CHUNK = 500
DAY_MS = 86_400_000
GIVE_UP_SECONDS = 60.0


@dataclass
class Production:
    """Records produced by a thread of its own into given partitions, up to the `share` of them that is asked for at the time.

    `join` asks for all and raises what went wrong.
    """

    bootstrap: str
    topic: str
    partitions: int
    records: int
    seed: str
    share: float = 0.05
    log: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._produce, daemon=True)
        self._thread.start()

    def join(self) -> pa.Table:
        """Wait until every record is sent and acknowledged.

        Returns:
            The log, LOG_SCHEMA.
        """
        self.share = 1.0
        self._thread.join()
        if self.failures or len(self.log) != self.records:
            raise RuntimeError(f"{len(self.log)} of {self.records} records were acknowledged: {self.failures[:3]}")
        return pa.Table.from_pylist(self.log, LOG_SCHEMA)

    def _produce(self) -> None:
        try:
            producer = Producer(
                {
                    "bootstrap.servers": self.bootstrap,
                    "acks": "all",
                    "enable.idempotence": True,  # a broker that is killed makes no gap and no repetition
                    "message.timeout.ms": int(GIVE_UP_SECONDS * 1000),
                    "message.max.bytes": 2_000_000,
                    "compression.type": "lz4",
                    "linger.ms": 5,
                    "log_level": 0,
                }
            )
            dice = random.Random(self.seed)
            for n in range(self.records):
                while n >= self.share * self.records:
                    producer.poll(0.02)
                if n % CHUNK == 0:
                    producer.poll(0)
                self._one(producer, dice, n)
            if producer.flush(GIVE_UP_SECONDS):
                self.failures.append("flush timed out")
        except Exception as error:
            self.failures.append(repr(error))

    def _one(self, producer: Producer, dice: random.Random, n: int) -> None:
        key, headers, payload = record(dice, n)

        def acknowledged(error: object, message: Message) -> None:
            if error is not None:
                self.failures.append(str(error))
                return
            named = [{"key": k, "value": v} for k, v in headers]
            self.log.append(
                {
                    "topic": message.topic(),
                    "partition": message.partition(),
                    "offset": message.offset(),
                    "key": key,
                    "headers": named,
                    "payload": payload,
                }
            )

        days_late = dice.choice((1, 2)) if dice.random() < 0.01 else 0
        while True:
            try:
                producer.produce(
                    self.topic,
                    payload,
                    key,
                    partition=dice.randrange(self.partitions),
                    headers=headers,
                    timestamp=int(time.time() * 1000) - days_late * DAY_MS,
                    on_delivery=acknowledged,
                )
            except BufferError:  # the broker is away
                producer.poll(0.1)
            else:
                return


def record(dice: random.Random, n: int) -> tuple[bytes | None, list[tuple[str, bytes | None]], bytes | None]:
    """Key, headers and payload: mostly small, sometimes a tombstone, empty, not text, or a megabyte; never two alike."""
    lot = dice.random()
    payload: bytes | None
    if n == 0:
        payload = dice.randbytes(1_048_576)
    elif lot < 0.01:
        payload = None
    elif lot < 0.02:
        payload = b""
    elif lot < 0.5:
        payload = b'{"n": %d, "text": "%s"}' % (n, dice.randbytes(dice.randrange(60)).hex().encode())
    else:
        payload = dice.randbytes(dice.randrange(200))
    key = (None, b"", b"\xff\x00", b"key-%d" % (n % 97))[min(3, int(dice.random() * 20))]
    headers: list[tuple[str, bytes | None]] = []
    if dice.random() < 0.2:
        headers = [("source", b"web"), ("source", None), ("bin", dice.randbytes(3)), ("", b"")][: dice.randrange(1, 5)]
    return key, headers, payload


def save(log: pa.Table, path: Path) -> None:
    """Keep the log, for the verifier and for whoever replays the round."""
    feather.write_feather(log, path, compression="zstd")
