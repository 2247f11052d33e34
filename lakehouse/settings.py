"""Settings, read once from the environment (`LAKEHOUSE_*`); secrets are never printed.

Three profiles run the same code: `embedded` (a laptop, the default), `local` (real services on one machine), `aws`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from lakehouse.errors import UsageError

PREFIX = "LAKEHOUSE_"
ROOT = Path(__file__).resolve().parent.parent


class Settings(BaseSettings):
    """All settings. Each field `x` is the environment variable `LAKEHOUSE_X`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    profile: Literal["embedded", "local", "aws"] = "embedded"
    home: Path = Field(Path(".lakehouse"), description="folder of all local state (embedded profile)")
    catalog_dir: Path = Field(ROOT / "catalog", description="the table declarations")
    transforms_dir: Path = Field(ROOT / "transforms", description="the transforms")
    report_dir: Path = Field(ROOT / "report", description="the sections of `lakehouse report`")
    audits_dir: Path = Field(ROOT / "audits", description="what `lakehouse audit` asks")

    catalog_uri: str | None = Field(
        None, description="Iceberg catalog: sqlite:///FILE, http(s)://... (REST) or glue: ; embedded: a SQLite file under `home`"
    )
    catalog_credential: SecretStr | None = Field(None, description="REST: OAuth2 client credentials, ID:SECRET")
    catalog_token: SecretStr | None = Field(None, description="REST: a bearer token, where there are no client credentials")
    catalog_scope: str | None = Field(None, description="REST: the OAuth2 scope to ask for")
    catalog_oauth_uri: str | None = Field(None, description="REST: where tokens are given out, if not by the catalog itself")
    catalog_timeout_seconds: float = Field(30.0, gt=0, description="how long an answer of the Iceberg catalog is waited for")
    warehouse: str | None = Field(None, description="where data files go; embedded: a folder under `home`")

    s3_endpoint: str | None = Field(None, description="URL of an S3 API that is not AWS's own")
    s3_region: str | None = Field(None, description="region of the bucket, and of Glue unless it has its own")
    s3_access_key_id: str | None = Field(
        None, description="for S3 and Glue; none: AWS's default chain (role, profile, environment)"
    )
    s3_secret_access_key: SecretStr | None = None
    s3_session_token: SecretStr | None = None
    s3_timeout_seconds: float = Field(30.0, gt=0, description="how long the object store may be silent")
    glue_endpoint: str | None = Field(None, description="URL of a Glue API that is not AWS's own")
    glue_region: str | None = Field(None, description="region of the Glue catalog, if not the bucket's")
    glue_catalog_id: str | None = Field(None, description="the AWS account whose Glue catalog it is, if another")

    kafka_bootstrap: str | None = Field(None, description="host:port of the brokers; embedded: `lakehouse up` writes it")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "AWS_MSK_IAM"] | None = None
    kafka_username: str | None = None
    kafka_password: SecretStr | None = None
    kafka_ca: Path | None = Field(None, description="CA certificates of the brokers (PEM), if not those of the system")
    product_topic: str = "product.events"
    stripe_topic: str = "stripe.webhooks"
    ingest_rows: int = Field(1_000_000, ge=1, description="a batch of a Kafka writer is committed after this many records ...")
    ingest_bytes: int = Field(2**30, ge=1, description="... or this many bytes ...")
    ingest_seconds: float = Field(30.0, gt=0, description="... or this long after its first record")
    ingest_session_seconds: float = Field(
        10.0, ge=1, description="a writer silent for so long loses its partitions to the others"
    )
    ingest_refresh_seconds: float = Field(30.0, ge=1, description="how often a writer looks for new partitions of its topic")
    batch_rows: int = Field(50_000, ge=1, description="a transform takes up to this many new rows at a time")

    webhook_host: str = "127.0.0.1"
    webhook_port: int = Field(0, ge=0, le=65535, description="0 picks a free port")
    webhook_secrets: list[SecretStr] = Field(default_factory=list, description='JSON list, e.g. ["whsec_..."]')
    webhook_tolerance_seconds: int = Field(300, ge=1)
    webhook_max_bytes: int = Field(1_000_000, ge=1)

    stripe_api_key: SecretStr | None = Field(None, description="restricted key that may read; for `lakehouse reconcile`")
    stripe_api_base: str = Field("https://api.stripe.com", description="where the Stripe API is")
    stripe_api_version: str = Field("2025-03-31.basil", description="the version that fetched objects are rendered at")
    stripe_rate_limit: float = Field(25.0, gt=0, description="requests a second that Stripe allows on one endpoint ...")
    stripe_rate_share: float = Field(0.5, gt=0, le=1, description="... and the share of them that reconciliation may use")

    metrics_host: str = Field("127.0.0.1", description="address on which a long-running command serves its metrics ...")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="... and port (Prometheus); not served if unset")
    metrics_file: Path | None = Field(None, description="file to which a command writes its metrics when it ends")

    crm_url: str | None = Field(None, description="SQLAlchemy URL of the CRM; embedded: a SQLite file under `home`")

    compact_files: int = Field(
        16, ge=2, description="maintenance rewrites this many small files of a partition, or fewer in a cold one"
    )
    compact_cold_minutes: int = Field(60, ge=0, description="a partition that got no file for this long has gone cold")
    compact_days: int = Field(35, ge=1, description="maintenance looks for small files in partitions of the last days alone")
    expired_files_hours: float = Field(1, ge=0, description="files of expired snapshots stay this long, for readers at work")
    orphan_hours: float = Field(72, ge=0, description="files that no snapshot names stay this long")

    duckdb_memory: str = Field("512MB", description="DuckDB's memory limit; it spills to disk beyond")
    duckdb_threads: int = Field(2, ge=1)

    @field_validator("home", "catalog_dir", "transforms_dir", "report_dir", "audits_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("home")
    @classmethod
    def _folder(cls, value: Path) -> Path:
        if value.exists() and not value.is_dir():
            raise ValueError("a file is there, not a folder")
        if bad := sorted(set(str(value)) & set("*?[]#%")):
            raise ValueError(f"a folder name with {bad[0]!r} in it means something else in a pattern or URL; choose another")
        return value

    @field_validator("catalog_uri")
    @classmethod
    def _iceberg_catalog(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("sqlite:///", "http://", "https://", "glue:")):
            raise ValueError(
                "the URI begins with sqlite:/// (a file), http:// or https:// (an Iceberg REST catalog), or is glue: (AWS Glue)"
            )
        return value

    @field_validator("s3_endpoint", "glue_endpoint", "catalog_oauth_uri")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return value

    @field_validator("duckdb_memory")
    @classmethod
    def _memory(cls, value: str) -> str:
        if not re.fullmatch(r"\d+(\.\d+)? ?([KMGT]i?B)", value, re.IGNORECASE):
            raise ValueError("a number and a unit, such as 512MB or 2GiB")
        return value

    @field_validator("warehouse")
    @classmethod
    def _known_store(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("file:///", "s3://")):
            raise ValueError("must begin with file:/// or s3://")
        return value

    @field_validator("stripe_api_base")
    @classmethod
    def _keeps_the_key(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme != "https" and not (url.scheme == "http" and url.hostname in ("127.0.0.1", "localhost", "::1")):
            raise ValueError("must begin with https:// (or http:// on this machine): the API key travels with each request")
        return value.rstrip("/")

    @field_validator("crm_url")
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                make_url(value)
            except ArgumentError:
                raise ValueError("not an SQLAlchemy URL, such as postgresql+psycopg://host/database") from None
        return value

    @model_validator(mode="after")
    def _nothing_of_a_laptop(self) -> Self:
        """Another profile than the embedded one must say where its services are: it never falls back on local files."""
        needed = {"local": ("catalog_uri", "warehouse", "kafka_bootstrap"), "aws": ("warehouse", "kafka_bootstrap")}
        if missing := [n for n in needed.get(self.profile, ()) if getattr(self, n) is None]:
            names = ", ".join(PREFIX + n.upper() for n in missing)
            start = "; or start its services in another shell: lakehouse up" if self.profile == "local" else ""
            raise ValueError(f"{PREFIX}PROFILE: the profile {self.profile!r} needs {names}{start}")
        return self

    @model_validator(mode="after")
    def _who_we_are_to_kafka(self) -> Self:
        """Half of a proof is a mistake that would show as an endless reconnect, or as a password sent to nobody."""
        sasl, iam = self.kafka_security_protocol.startswith("SASL"), self.kafka_sasl_mechanism == "AWS_MSK_IAM"
        if sasl and not self.kafka_sasl_mechanism:
            raise ValueError(f"{PREFIX}KAFKA_SASL_MECHANISM: {self.kafka_security_protocol} needs one")
        if sasl and not iam and not (self.kafka_username and self.kafka_password):
            raise ValueError(f"{PREFIX}KAFKA_USERNAME: {self.kafka_sasl_mechanism} needs it, and {PREFIX}KAFKA_PASSWORD")
        if not sasl and (self.kafka_sasl_mechanism or self.kafka_username or self.kafka_password):
            raise ValueError(
                f"{PREFIX}KAFKA_SECURITY_PROTOCOL: must be SASL_SSL or SASL_PLAINTEXT for a user or mechanism to count"
            )
        return self

    @property
    def all_embedded(self) -> bool:
        """Whether everything is this command's own: only then may the demo write to it."""
        return self.profile == "embedded" and not any((self.catalog_uri, self.warehouse, self.kafka_bootstrap, self.crm_url))

    @property
    def iceberg_catalog_uri(self) -> str:
        """The Iceberg catalog's URI, with the embedded default filled in."""
        return self.catalog_uri or ("glue:" if self.profile == "aws" else f"sqlite:///{self.home / 'catalog.db'}")

    @property
    def iceberg_warehouse(self) -> str:
        """Root of the warehouse, with the embedded default filled in."""
        return self.warehouse or f"file://{self.home / 'warehouse'}"

    @property
    def crm_database_url(self) -> str:
        """SQLAlchemy URL of the CRM database, with the embedded default filled in."""
        return self.crm_url or f"sqlite:///{self.home / 'world' / 'crm.db'}"


def local_file(home: Path) -> Path:
    """Where `lakehouse up` of the local profile writes the variables with which its services are reached."""
    return home / "run" / "local.json"


def home_folder() -> Path:
    """The home that the environment says, for who needs it before there can be settings."""
    return Path(os.environ.get(PREFIX + "HOME") or ".lakehouse").expanduser().absolute()


def _started_here() -> dict[str, Any]:
    """The local profile: what its running services say of themselves and the environment does not."""
    if os.environ.get(PREFIX + "PROFILE") != "local":
        return {}
    try:
        said: dict[str, str] = json.loads(local_file(home_folder()).read_text("utf-8"))
    except (OSError, ValueError):  # they do not run
        return {}
    return {name.removeprefix(PREFIX).lower(): value for name, value in said.items() if not os.environ.get(name)}


def load_settings() -> Settings:
    """Read the settings from the environment.

    Raises:
        UsageError: naming each variable that is unknown or has a wrong value (never showing the value: it may be secret).
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    problems = []
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            problems.append(f"{name}: no such setting" + (f"; did you mean {close[0]}?" if close else ""))
    try:
        settings = Settings(**_started_here())
    except ValidationError as error:
        problems += [
            (f"{PREFIX}{'.'.join(map(str, e['loc'])).upper()}: " if e["loc"] else "") + e["msg"].removeprefix("Value error, ")
            for e in error.errors()
        ]
    except SettingsError:  # a list that is not JSON; the error quotes the value
        problems.append(f"{PREFIX}WEBHOOK_SECRETS: not a JSON list; write it as {PREFIX}WEBHOOK_SECRETS='[\"whsec_...\"]'")
    if problems:
        raise UsageError("wrong settings in the environment:\n  " + "\n  ".join(problems) + "\nSee: lakehouse settings")
    return settings
