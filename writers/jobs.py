"""What the writers do when they are called as jobs: bring every source up to date, and run the webhook receiver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from lakehouse.errors import UsageError
from lakehouse.lake import Lake
from lakehouse.queries import connect
from lakehouse.services import Services
from lakehouse.settings import Settings
from writers.crm import TABLES as CRM_SOURCES
from writers.crm import ingest_crm
from writers.kafka import Batch, received_by_kafka
from writers.kafka import ingest as ingest_topic
from writers.reconcile import reconcile as reconcile_account
from writers.reconcile_job import Report
from writers.stripe import with_envelope
from writers.stripe_api import StripeReader
from writers.webhook_records import KafkaProduce
from writers.webhooks import WEBHOOK_PATH, ReceiverServer, create_app

__all__ = ["CRM_SOURCES", "SOURCES", "ingest", "ingest_crm", "receiver", "reconcile"]

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
    for name in names or SOURCES:
        if name == "raw.stripe_events":
            with connect(lake.settings) as connection:
                batches += ingest_topic(
                    lake, name, services.stripe_topic, services.bootstrap, lambda rows: with_envelope(connection, rows), on_batch
                )
        elif name == "raw.product_events":
            batches += ingest_topic(lake, name, services.product_topic, services.bootstrap, received_by_kafka, on_batch)
        else:
            for batch in ingest_crm(lake, services.crm_url, seen_at, [name]):
                batches.append(batch)
                if on_batch:
                    on_batch(batch)
    return batches


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
    with KafkaProduce(services.bootstrap, services.stripe_topic) as produce:
        return reconcile_account(lake, reader, produce, since=since, events=events, objects=objects, say=say)


@contextmanager
def receiver(settings: Settings, services: Services, clock: Callable[[], float]) -> Iterator[str]:
    """Run the webhook receiver against the services' Kafka while the context is open; gives the URL to post to."""
    if not settings.webhook_secrets:
        raise UsageError("no signing secret: set LAKEHOUSE_WEBHOOK_SECRETS='[\"whsec_...\"]' (Stripe dashboard, Webhooks)")
    with KafkaProduce(services.bootstrap, services.stripe_topic) as produce:
        app = create_app(
            produce=produce,
            secrets=settings.webhook_secrets,
            clock=clock,
            tolerance_seconds=settings.webhook_tolerance_seconds,
            max_body_bytes=settings.webhook_max_bytes,
        )
        with ReceiverServer(app, settings.webhook_host, settings.webhook_port) as server:
            yield f"{server.url}{WEBHOOK_PATH}"
