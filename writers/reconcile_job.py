"""One run of a reconciliation: what it reads, where it sends, what it keeps, and what it has found so far."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import polars as pl

from lakehouse.drift import FOUND, OBJECT, WHOLE, Position, record
from lakehouse.lake import Lake
from writers.canonical import PLATFORM
from writers.stripe_api import StripeReader
from writers.webhook_records import Produce, Record, make_record

CONSUMER = "stripe_api"
EVENTS, OBJECTS = "stripe_events", "stripe_objects"
SETTLE_SECONDS = 15 * 60
"""Younger than this, an event may still be on its way to us: it is neither missed nor compared."""
SEND_AT_ONCE = 1_000

Say = Callable[[str, int, int], None]


@dataclass
class Events:
    """Of the events pass: listed by Stripe, missing with us (extra: not listed), sent to the raw topic.

    unreachable_from: the last run is so long ago that Stripe no longer lists what came after it: sweep the objects.
    """

    listed: int = 0
    missing: int = 0
    extra: int = 0
    sent: int = 0
    unreachable_from: str | None = None


@dataclass
class Sweep:
    """Of one object type. in_flight: they differ, but something about them is still on its way to us; refused: not understood."""

    checked: int = 0
    differing: int = 0
    missing: int = 0
    extra: int = 0
    in_flight: int = 0
    refused: int = 0
    sent: int = 0


@dataclass
class Report:
    """What a reconciliation found and did. lasting: differences that an earlier run had found, and this one found again."""

    run_id: str
    account: str
    livemode: bool
    events: Events = field(default_factory=Events)
    objects: dict[str, Sweep] = field(default_factory=dict)
    resolved: int = 0
    open: int = 0
    lasting: int = 0
    requests: int = 0
    refused: int = 0
    failed: int = 0
    waited_seconds: float = 0.0

    @property
    def differences(self) -> int:
        """Events and objects that differ, whether repaired or not."""
        swept = sum(s.differing + s.missing + s.extra + s.refused for s in self.objects.values())
        return self.events.missing + self.events.extra + swept


@dataclass
class Job:
    """One run over one account: where it reads, where it sends (None: a dry run), and what it knows of things on their way."""

    lake: Lake
    reader: StripeReader
    produce: Produce | None
    report: Report
    say: Say
    began: datetime
    on_their_way: set[str | None] = field(default_factory=set)

    @property
    def account(self) -> str:
        """The account as our tables call it."""
        return self.reader.account or PLATFORM

    def named(self, object_type: str, ids: pl.DataFrame) -> pl.DataFrame:
        """Object ids (column object_id) as objects of this account and mode: columns OBJECT."""
        known = {"account": pl.lit(self.account), "livemode": pl.lit(self.reader.livemode), "object_type": pl.lit(object_type)}
        return ids.with_columns(**known).select(OBJECT)

    def send(self, payloads: Sequence[tuple[bytes, int]], source: str) -> int:
        """Make (payload, `Date` of the response that had it) durable in the raw topic; returns how many.

        That date is also when it was received: what Stripe's clock says of a fetch is when the fact became known to us.
        """
        if self.produce is None:
            return 0
        for i in range(0, len(payloads), SEND_AT_ONCE):
            records = [make_record(body, at, source) for body, at in payloads[i : i + SEND_AT_ONCE]]
            asyncio.run(_all_durable(self.produce, records))
        return len(payloads)

    def keep(self, source: str, found: pl.DataFrame, checked: pl.DataFrame, position: Position) -> None:
        """Commit what was found and how far the comparison came; a dry run keeps nothing."""
        if self.produce is not None:
            done = record(self.lake, source, found, checked, datetime.now(UTC), position)
            self.report.resolved += done.resolved


async def _all_durable(produce: Produce, records: Sequence[Record]) -> None:
    await asyncio.gather(*(produce(record) for record in records))


def whole_objects(job: Job, object_type: str, rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Rows that speak of whole objects, with columns FOUND, theirs_at and sent."""
    common = {"account": job.account, "livemode": job.reader.livemode, "object_type": object_type, "field": WHOLE}
    schema = {**FOUND, "theirs_at": pl.Datetime("us", "UTC"), "sent": pl.Boolean()}
    return pl.DataFrame([{**dict.fromkeys(schema), **common, **row} for row in rows], schema=schema)


class _Object(msgspec.Struct):
    id: str | None = None


class _Data(msgspec.Struct):
    object: _Object


class EventHead(msgspec.Struct):
    """What reconciliation reads of an event."""

    type: str
    data: _Data
    account: str | None = None


_event = msgspec.json.Decoder(EventHead)


def event_of(body: bytes) -> EventHead:
    """The head of an event that Stripe gave."""
    return _event.decode(body)


def utc(epoch: int) -> datetime:
    """Epoch seconds as a time."""
    return datetime.fromtimestamp(epoch, UTC)


def text_of(value: Any) -> str:
    """A value as JSON text."""
    return msgspec.json.encode(value).decode()
