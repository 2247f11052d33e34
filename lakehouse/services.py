"""The services around the lake: where Kafka and the webhook receiver are, and how the embedded ones are started.

The embedded broker keeps its log in memory, so each start is an empty log. Its topics get a new name at each start
(`product.events.3`), so that the coordinates of a record never come twice and no position has to be turned back.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lakehouse.broker import EmbeddedBroker, ensure_topics
from lakehouse.errors import UsageError
from lakehouse.settings import PREFIX, Settings, home_folder, load_settings, local_file

PRODUCT_PARTITIONS, STRIPE_PARTITIONS = 4, 2


@dataclass(frozen=True)
class Services:
    """Addresses: Kafka and its topics, the webhook receiver, the CRM database."""

    bootstrap: str
    product_topic: str
    stripe_topic: str
    crm_url: str
    webhook_url: str = ""
    pid: int = 0


def _services_file(settings: Settings) -> Path:
    return settings.home / "run" / "services.json"


@contextmanager
def _lock(settings: Settings, kind: int, patience: float = 0.0) -> Iterator[bool]:
    """Hold the lock of the embedded services of this home; False if that cannot be within `patience` seconds.

    The kernel frees it however its holder dies. A process id tells less: another process may have it by now, and after the
    restart of a container even this one.
    """
    path = settings.home / "run" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield False
                    return
                time.sleep(0.02)
            else:
                yield True
                return


def running_services(settings: Settings) -> int:
    """The process that runs the embedded services of this home; 0 if none does."""
    if not _services_file(settings).exists():
        return 0
    with _lock(settings, fcntl.LOCK_SH) as ours:
        return 0 if ours else _read_services(settings).pid


def _read_services(settings: Settings) -> Services:
    try:
        return Services(**json.loads(_services_file(settings).read_text("utf-8")))
    except (OSError, ValueError, TypeError):  # its owner is about to write or to remove it
        return Services("", "", "", "")


def find_services(settings: Settings) -> Services:
    """The services to use: those in the settings, else the embedded ones that `lakehouse up` or `demo` has running.

    Raises:
        UsageError: neither is there.
    """
    if settings.kafka_bootstrap:
        return Services(settings.kafka_bootstrap, settings.product_topic, settings.stripe_topic, settings.crm_database_url)
    if running_services(settings):
        return _read_services(settings)
    raise UsageError(
        "no Kafka broker: start the embedded one in another shell (lakehouse up), or set LAKEHOUSE_KAFKA_BOOTSTRAP=host:port"
    )


def kafka_config(settings: Settings, bootstrap: str) -> dict[str, Any]:
    """librdkafka's settings for any client of these brokers: where they are, and how we prove who we are. It holds the password.

    Raises:
        UsageError: MSK IAM is asked for, and its signer is not installed.
    """
    config: dict[str, Any] = {"bootstrap.servers": bootstrap, "log_level": 0}  # what goes wrong is raised, not logged
    if bootstrap != settings.kafka_bootstrap or settings.kafka_security_protocol == "PLAINTEXT":
        return config  # the embedded broker knows nobody
    config["security.protocol"] = settings.kafka_security_protocol
    if settings.kafka_ca:
        config["ssl.ca.location"] = str(settings.kafka_ca)
    if settings.kafka_sasl_mechanism == "AWS_MSK_IAM":
        return config | {"sasl.mechanism": "OAUTHBEARER", "oauth_cb": _msk_token(settings.s3_region)}
    if settings.kafka_sasl_mechanism and settings.kafka_password:
        config |= {
            "sasl.mechanism": settings.kafka_sasl_mechanism,
            "sasl.username": settings.kafka_username,
            "sasl.password": settings.kafka_password.get_secret_value(),
        }
    return config


def _msk_token(region: str | None) -> Callable[[str], tuple[str, float]]:
    """What gives librdkafka a token for MSK, signed with the credentials of AWS's default chain, whenever the last one ends."""
    try:
        from aws_msk_iam_sasl_signer import MSKAuthTokenProvider
    except ModuleNotFoundError:
        raise UsageError(
            "AWS_MSK_IAM needs Amazon's signer, which is not installed: pip install aws-msk-iam-sasl-signer-python"
        ) from None
    if region is None:
        raise UsageError("AWS_MSK_IAM needs the region of the brokers: set LAKEHOUSE_S3_REGION")

    def token(_config: str) -> tuple[str, float]:
        signed, expires_ms = MSKAuthTokenProvider.generate_auth_token(region)
        return signed, expires_ms / 1000  # librdkafka wants seconds

    return token


def starts_local_services() -> bool:
    """Whether `lakehouse up` is to start the local profile's services: it is asked for, and no other services are named."""
    named = ("CATALOG_URI", "WAREHOUSE", "KAFKA_BOOTSTRAP")
    return os.environ.get(PREFIX + "PROFILE") == "local" and not any(os.environ.get(PREFIX + name) for name in named)


@contextmanager
def local_profile() -> Iterator[Settings]:
    """Run SeaweedFS and Apache Kafka with their data under the home; other commands of the local profile find them.

    Gives the settings with which they are reached.

    Raises:
        UsageError: one is not installed, or they run already.
    """
    from lakehouse.local.kafka import KafkaBroker, why_unavailable
    from lakehouse.local.seaweedfs import SeaweedFS

    if reason := why_unavailable():
        raise UsageError(reason)
    home = home_folder()
    file = local_file(home)
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / "local.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"the services of {home} already run; stop them first") from None
        with SeaweedFS(home / "seaweedfs", table_buckets=("lake",)) as store, KafkaBroker(home / "kafka") as kafka:
            said = store.environment() | {
                "LAKEHOUSE_CATALOG_URI": store.catalog_uri,
                "LAKEHOUSE_CATALOG_CREDENTIAL": f"{store.access_key_id}:{store.secret_access_key}",
                "LAKEHOUSE_WAREHOUSE": "s3://lake",
                "LAKEHOUSE_KAFKA_BOOTSTRAP": kafka.bootstrap_servers,
            }
            file.touch(mode=0o600)
            file.write_text(json.dumps(said), "utf-8")
            try:
                settings = load_settings()
                topics = {settings.product_topic: PRODUCT_PARTITIONS, settings.stripe_topic: STRIPE_PARTITIONS}
                ensure_topics(kafka.bootstrap_servers, topics, timeout_seconds=60)
                yield settings
            finally:
                file.unlink(missing_ok=True)


def _next_start(settings: Settings) -> int:
    """A number that grows with each start of the embedded broker, kept under `home`."""
    path = settings.home / "run" / "starts"
    path.parent.mkdir(parents=True, exist_ok=True)
    number = int(path.read_text("utf-8")) + 1 if path.exists() else 1
    path.write_text(str(number), "utf-8")
    return number


@contextmanager
def embedded_services(
    settings: Settings, receiver: Callable[[Services], AbstractContextManager[str]] | None = None
) -> Iterator[Services]:
    """Run the embedded broker (and a receiver, if given) while the context is open; other commands find them.

    Raises:
        UsageError: they already run over the same home.
    """
    with _lock(settings, fcntl.LOCK_EX, patience=1.0) as ours:  # others hold it for a moment, to see whether we run
        if not ours:
            running = _read_services(settings).pid or "just starting or ending"
            raise UsageError(f"the embedded services of {settings.home} already run (process {running}); stop them first")
        with _embedded_services(settings, receiver) as services:
            yield services


@contextmanager
def _embedded_services(
    settings: Settings, receiver: Callable[[Services], AbstractContextManager[str]] | None
) -> Iterator[Services]:
    path = _services_file(settings)
    number = _next_start(settings)
    with EmbeddedBroker(settings.home / "run") as broker:
        services = Services(
            bootstrap=broker.bootstrap_servers,
            product_topic=f"{settings.product_topic}.{number}",
            stripe_topic=f"{settings.stripe_topic}.{number}",
            crm_url=settings.crm_database_url,
            pid=os.getpid(),
        )
        ensure_topics(services.bootstrap, {services.product_topic: PRODUCT_PARTITIONS, services.stripe_topic: STRIPE_PARTITIONS})
        try:
            if receiver is None:
                path.write_text(json.dumps(asdict(services)), "utf-8")
                yield services
            else:
                with receiver(services) as url:
                    services = Services(**{**asdict(services), "webhook_url": url})
                    path.write_text(json.dumps(asdict(services)), "utf-8")
                    yield services
        finally:
            path.unlink(missing_ok=True)
