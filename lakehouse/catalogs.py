"""How the Iceberg catalog and its object store are reached: SQLite, REST or Glue; with time limits, and no retry behind our back.

A request that only reads is tried again by the client. One that changes a table is sent once: whether it landed is for
`lakehouse/publish.py` to find out, since a client that sends a commit twice reports a conflict with itself.
"""

from __future__ import annotations

import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pyiceberg.catalog import Catalog
from pyiceberg.catalog.rest import RestCatalog
from pyiceberg.catalog.sql import SqlCatalog
from requests import PreparedRequest, Response, Session
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from lakehouse.errors import UsageError
from lakehouse.settings import Settings

NAME = "lake"
CONNECT_SECONDS = 5.0
READ_ATTEMPTS = 4
BUSY = (429, 502, 503, 504)  # HTTP statuses after which reading again helps


def open_catalog(settings: Settings) -> Catalog:
    """The Iceberg catalog of the settings.

    Raises:
        UsageError: a client is not installed..
    """
    uri = settings.iceberg_catalog_uri
    if uri.startswith("glue:"):
        return _glue(settings)
    if not uri.startswith("sqlite:"):
        return _rest(settings)
    Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    # several processes commit to one SQLite file: wait for its lock instead of failing at once
    return SqlCatalog(NAME, uri=f"{uri}?timeout=30", warehouse=settings.iceberg_warehouse, **s3_properties(settings))


def s3_properties(settings: Settings) -> dict[str, str]:
    """pyiceberg's properties for the object store; without keys it finds those of AWS's default chain itself."""
    if not settings.iceberg_warehouse.startswith("s3:"):
        return {}
    found = {
        "s3.endpoint": settings.s3_endpoint,
        "s3.region": settings.s3_region,
        "s3.access-key-id": settings.s3_access_key_id,
        "s3.secret-access-key": _revealed(settings.s3_secret_access_key),
        "s3.session-token": _revealed(settings.s3_session_token),
        "s3.connect-timeout": str(CONNECT_SECONDS),
        "s3.request-timeout": str(settings.s3_timeout_seconds),
    }
    return {name: value for name, value in found.items() if value is not None}


def _revealed(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


class _Adapter(HTTPAdapter):  # type: ignore[misc] # requests has no types
    """Gives every request a time limit, which pyiceberg does not, and tries those again that only read."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        super().__init__(
            max_retries=Retry(
                READ_ATTEMPTS - 1,
                allowed_methods=("GET", "HEAD"),
                status_forcelist=BUSY,
                backoff_factor=0.1,
                raise_on_status=False,
            )
        )

    def send(self, request: PreparedRequest, *args: Any, **options: Any) -> Response:
        """As `HTTPAdapter.send`, within the time limit."""
        options["timeout"] = options.get("timeout") or (CONNECT_SECONDS, self._seconds)
        return super().send(request, *args, **options)


class _RestCatalog(RestCatalog):
    """pyiceberg's REST catalog with the adapter above; `_config_headers` is what it calls before its first request."""

    def _config_headers(self, session: Session) -> None:
        adapter = _Adapter(float(self.properties["lakehouse.timeout"]))
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        super()._config_headers(session)


def _rest(settings: Settings) -> Catalog:
    found = {
        "uri": settings.iceberg_catalog_uri,
        "warehouse": settings.iceberg_warehouse,
        "credential": _revealed(settings.catalog_credential),
        "token": _revealed(settings.catalog_token),
        "scope": settings.catalog_scope,
        "oauth2-server-uri": settings.catalog_oauth_uri or f"{settings.iceberg_catalog_uri.rstrip('/')}/v1/oauth/tokens",
        "lakehouse.timeout": str(settings.catalog_timeout_seconds),
    }
    return _RestCatalog(NAME, **{k: v for k, v in found.items() if v is not None}, **s3_properties(settings))


class _CommitsOnce:
    """A Glue client that retries what reads, and sends what commits once."""

    def __init__(self, patient: Any, once: Any) -> None:
        self._patient, self._once = patient, once

    def __getattr__(self, name: str) -> Any:
        return getattr(self._once if name == "update_table" else self._patient, name)


_session_lock = threading.Lock()  # a session may not make two clients at once


@cache
def _session() -> Any:
    """The one AWS session of this process: a new one reads the description of Glue again, which takes 0.2 s."""
    import boto3

    return boto3.Session()


def _glue(settings: Settings) -> Catalog:
    if find_spec("boto3") is None:
        raise UsageError("the Glue client is not installed; run: pip install 'streamforge-lakehouse[aws]'")
    from botocore.config import Config
    from pyiceberg.catalog.glue import GlueCatalog

    def client(attempts: int) -> Any:
        with _session_lock:
            made = _session().client(
                "glue",
                region_name=settings.glue_region or settings.s3_region,
                aws_access_key_id=settings.s3_access_key_id,
                aws_secret_access_key=_revealed(settings.s3_secret_access_key),
                aws_session_token=_revealed(settings.s3_session_token),
                endpoint_url=settings.glue_endpoint,
                config=Config(
                    connect_timeout=CONNECT_SECONDS,
                    read_timeout=settings.catalog_timeout_seconds,
                    retries={"mode": "standard", "total_max_attempts": attempts},
                ),
            )
        if settings.glue_catalog_id:
            made.meta.events.register("provide-client-params.glue", _with_catalog_id(settings.glue_catalog_id))
        return made

    clients: Any = _CommitsOnce(client(READ_ATTEMPTS), client(1))
    return GlueCatalog(NAME, client=clients, warehouse=settings.iceberg_warehouse, **s3_properties(settings))


def _with_catalog_id(catalog_id: str) -> Any:
    def add(params: dict[str, Any], **_: Any) -> None:
        params.setdefault("CatalogId", catalog_id)

    return add
