"""A lake fed with a simulated world's webhooks but some, and that world's Stripe API to reconcile it with; no broker."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import SecretStr

from lakehouse.lake import Lake, Run, open_lake
from lakehouse.queries import connect
from lakehouse.runner import run
from lakehouse.settings import Settings
from simulator.account import Account
from simulator.api import Faults, StripeApi
from simulator.events import StripeEvent
from tests.feed import _append
from writers.reconcile import reconcile
from writers.reconcile_job import Report
from writers.records import RAW_SCHEMA
from writers.stripe import with_envelope
from writers.stripe_api import StripeReader
from writers.webhook_records import Record, make_record

LIVE, TEST = "sk_live_key", "sk_test_key"
NOW = int(datetime(2026, 3, 1, tzinfo=UTC).timestamp())
DAY = 86_400


@dataclass
class Topic:
    """The raw topic: what was produced waits here until `ingest`. `dies_after`: the process dies at so many records."""

    records: list[Record] = field(default_factory=list)
    dies_after: int | None = None

    async def __call__(self, record: Record) -> None:
        if self.dies_after is not None and len(self.records) >= self.dies_after:
            raise KeyboardInterrupt
        self.records.append(record)

    async def reachable(self) -> bool:
        return True

    def ingest(self, lake: Lake) -> None:
        """Commit what waits, as the Kafka writer does, and build the canonical versions."""
        feed(lake, self.records)
        self.records.clear()


def feed(lake: Lake, records: Sequence[Record]) -> None:
    """Records of the Stripe topic -> raw -> billing.event_versions."""
    if records:
        n = len(records)
        rows = pa.table(
            [
                ["stripe"] * n,
                [0] * n,
                [0] * n,
                [datetime.fromtimestamp(r.timestamp_ms / 1000, UTC) for r in records],
                [r.key for r in records],
                [[{"key": k, "value": v} for k, v in r.headers] for r in records],
                [r.value for r in records],
            ],
            schema=RAW_SCHEMA,
        )
        with connect(lake.settings) as connection:
            _append(lake, "raw.stripe_events", "stripe", with_envelope(connection, rows))
    run(lake, ["billing.event_versions", "billing.object_heads"])


def event(number: int, at: int, obj: dict[str, Any], kind: str = "customer.updated", **changes: Any) -> StripeEvent:
    """One event in true order `number`; `previous`: its previous attributes."""
    data = {"object": obj} | ({"previous_attributes": changes["previous"]} if "previous" in changes else {})
    return StripeEvent(
        id=changes.get("id", f"evt_{number}"),
        created=at,
        order=number,
        type=kind,
        object_id=obj["id"],
        object_type=obj["object"],
        api_version=changes.get("version", "2025-03-31.basil"),
        livemode=changes.get("livemode", True),
        data=data,
        request={"id": None, "idempotency_key": None},
    )


def customer(cid: str = "cus_1", **changes: Any) -> dict[str, Any]:
    return {"id": cid, "object": "customer", "created": NOW - 90 * DAY, "email": "a@example.com", "name": "A", **changes}


def as_webhook(e: StripeEvent, account: str | None = None) -> Record:
    body = e.body(1)
    if account:
        body = b'{"account":"' + account.encode() + b'",' + body[1:]
    return make_record(body, e.created + 2)


@dataclass
class Bench:
    """A lake in `home`, the raw topic, and the API that it is compared with."""

    home: Path
    api: StripeApi
    topic: Topic = field(default_factory=Topic)
    settings: dict[str, Any] = field(default_factory=dict)
    runs: int = 0
    before: list[Callable[[str], None]] = field(default_factory=list)
    """Called with the path of each request, before it is answered."""

    def lake(self, run_id: str = "feed") -> Lake:
        defaults: dict[str, Any] = {"stripe_api_key": SecretStr(LIVE), "stripe_rate_limit": 5_000.0}
        options = {"home": self.home, "stripe_api_base": self.api.url, **defaults, **self.settings}
        return open_lake(Settings(**options), Run(run_id, "test"))

    def reconcile(self, *objects: str, dry_run: bool = False, account: str | None = None, **options: Any) -> Report:
        """One run with a run id of its own."""
        self.runs += 1
        lake = self.lake(f"run{self.runs}")
        return reconcile(lake, StripeReader(lake.settings, account), None if dry_run else self.topic, objects=objects, **options)

    def ingest(self) -> None:
        self.topic.ingest(self.lake())


@contextmanager
def bench(
    home: Path,
    events: Sequence[StripeEvent],
    withheld: Collection[str] = (),
    *,
    clock: Callable[[], float] = lambda: NOW,
    faults: Faults | None = None,
    accounts: dict[str, Sequence[StripeEvent]] | None = None,
    **settings: Any,
) -> Iterator[Bench]:
    """A lake that holds the webhooks of all events but those withheld."""
    before: list[Callable[[str], None]] = []
    served: dict[str | None, Account] = {None: Account(events)}
    served |= {name: Account(of) for name, of in (accounts or {}).items()}
    with StripeApi(served, clock, [LIVE, TEST], faults, before_answer=lambda path: [b(path) for b in before]) as api:
        made = Bench(home, api, settings=settings, before=before)
        feed(made.lake(), [as_webhook(e) for e in events if e.id not in withheld])
        yield made
