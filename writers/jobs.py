"""What the writers do when they are called as jobs: bring every source up to date, and run the webhook receiver."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from lakehouse.errors import UsageError
from lakehouse.lake import Lake
from lakehouse.queries import connect
from lakehouse.services import Services, kafka_config
from lakehouse.settings import Settings
from writers import positions
from writers.crm import TABLES as CRM_SOURCES
from writers.crm import ingest_crm
from writers.kafka import Batch, Stream
from writers.kafka import follow as follow_topic
from writers.kafka import ingest as ingest_topic
from writers.positions import Standing
from writers.reconcile import reconcile as reconcile_account
from writers.reconcile_job import Report
from writers.records import received_by_kafka
from writers.stripe import with_envelope
from writers.stripe_api import StripeReader
from writers.vendor import VendorTable
from writers.vendor import compare_vendor as compare_export
from writers.webhook_records import KafkaProduce
from writers.webhook_server import ReceiverServer
from writers.webhooks import WEBHOOK_PATH, create_app

__all__ = [
    "CRM_SOURCES",
    "SOURCES",
    "STREAMS",
    "compare_vendor",
    "follow",
    "ingest",
    "ingest_crm",
    "receiver",
    "reconcile",
    "set_positions",
    "standings",
]

STREAMS = ("raw.stripe_events", "raw.product_events")
SOURCES = ("raw.stripe_events", *CRM_SOURCES, "raw.product_events")


def ingest(
    lake: Lake,
    services: Services,
    names: Sequence[str] = (),
    on_batch: Callable[[Batch], None] | None = None,
    seen_at: datetime | None = None,
) -> list[Batch]:
    """Commit what each source (default: all) holds now; `seen_at` is the time of the CRM poll (default: now).

    Raises:
        UsageError: a name is not a raw table that writers fill. Else see writers.kafka.ingest and writers.crm.ingest_crm.
    """
    if unknown := [n for n in names if n not in SOURCES]:
        raise UsageError(f"no writer fills {unknown[0]!r}; sources: {', '.join(SOURCES)}")
    batches: list[Batch] = []

    def told(batch: Batch) -> None:
        batches.append(batch)
        if on_batch:
            on_batch(batch)

    for name in names or SOURCES:
        if name in STREAMS:
            with _stream(lake, services, name) as stream:
                ingest_topic(lake, stream, told)
        else:
            for batch in ingest_crm(lake, services.crm_url, seen_at, [name]):
                told(batch)
    return batches


def follow(
    lake: Lake,
    services: Services,
    stop: threading.Event,
    names: Sequence[str] = (),
    on_batch: Callable[[Batch], None] | None = None,
) -> None:
    """Bring Kafka topics (default: all) to their tables until `stop` is set, each in a thread of its own.

    Raises:
        UsageError: a name is not a table that a topic is written to. Else the first failure of a topic, which stops the others.
    """
    for name in names:
        _require_stream(name)
    jobs = names or STREAMS

    def work(name: str) -> None:
        try:
            with _stream(lake, services, name) as stream:
                follow_topic(lake, stream, stop, on_batch)
        finally:
            stop.set()

    with ThreadPoolExecutor(len(jobs), thread_name_prefix="follow") as threads:
        for done in [threads.submit(work, name) for name in jobs]:
            done.result()


def standings(lake: Lake, services: Services, name: str) -> list[Standing]:
    """Where a raw table stands in each partition of its topic: see writers.positions.standings."""
    return positions.standings(lake, name, _topic(services, name), services.bootstrap)


def set_positions(
    lake: Lake,
    services: Services,
    name: str,
    partitions: list[int],
    to: int | str,
    why: str,
    *,
    again: bool = False,
    skip: bool = False,
) -> list[Standing]:
    """Set positions of a raw table by hand: see writers.positions.set_by_hand."""
    topic = _topic(services, name)
    return positions.set_by_hand(lake, name, topic, services.bootstrap, partitions, to, why, again=again, skip=skip)


def _require_stream(name: str) -> None:
    if name not in STREAMS:
        raise UsageError(f"no Kafka topic is written to {name!r}; those that are: {', '.join(STREAMS)}")


def _topic(services: Services, name: str) -> str:
    _require_stream(name)
    return services.stripe_topic if name == "raw.stripe_events" else services.product_topic


@contextmanager
def _stream(lake: Lake, services: Services, name: str) -> Iterator[Stream]:
    """The topic of a raw table, and what is added to its records."""
    topic = _topic(services, name)
    if name != "raw.stripe_events":
        yield Stream(name, topic, services.bootstrap, received_by_kafka)
        return
    with connect(lake.settings) as connection:
        yield Stream(name, topic, services.bootstrap, lambda rows: with_envelope(connection, rows))


def reconcile(
    lake: Lake,
    services: Services | None,
    *,
    account: str | None = None,
    since: datetime | None = None,
    events: bool = True,
    objects: Sequence[str] = (),
    say: Callable[[str, int, int], None] = lambda *_: None,
) -> Report:
    """Compare one Stripe account with the lake and repair what differs through the raw topic; without services only tell.

    Raises: see writers.reconcile.reconcile.
    """
    reader = StripeReader(lake.settings, account)
    if services is None:
        return reconcile_account(lake, reader, None, since=since, events=events, objects=objects, say=say)
    with KafkaProduce(
        services.bootstrap, services.stripe_topic, config=kafka_config(lake.settings, services.bootstrap)
    ) as produce:
        return reconcile_account(lake, reader, produce, since=since, events=events, objects=objects, say=say)


def compare_vendor(
    lake: Lake,
    folder: Path,
    *,
    account: str | None = None,
    dry_run: bool = False,
    say: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, VendorTable]:
    """Compare the tables of the vendor's connector in `folder` with ours; see writers.vendor."""
    return compare_export(lake, folder, account=account, dry_run=dry_run, say=say)


@contextmanager
def receiver(settings: Settings, services: Services, clock: Callable[[], float]) -> Iterator[str]:
    """Run the webhook receiver against the services' Kafka while the context is open; gives the URL to post to."""
    if not settings.webhook_secrets:
        raise UsageError("no signing secret: set LAKEHOUSE_WEBHOOK_SECRETS='[\"whsec_...\"]' (Stripe dashboard, Webhooks)")
    config = kafka_config(settings, services.bootstrap)
    with KafkaProduce(services.bootstrap, services.stripe_topic, config=config) as produce:
        app = create_app(
            produce=produce,
            secrets=settings.webhook_secrets,
            clock=clock,
            tolerance_seconds=settings.webhook_tolerance_seconds,
            max_body_bytes=settings.webhook_max_bytes,
        )
        with ReceiverServer(app, settings.webhook_host, settings.webhook_port) as server:
            yield f"{server.url}{WEBHOOK_PATH}"
