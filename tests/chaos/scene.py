"""Where rounds are played: Kafka, one Iceberg catalog with its object store, faulty proxies before them, a disk that can be full.

Started once for all rounds on a catalog. Writers see the faulty side of it; the harness itself looks at the table directly.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

from pyarrow import fs

from lakehouse.lake import Lake, Run, open_lake
from lakehouse.local import Kind, LocalServices, local_services
from lakehouse.local.kafka import KafkaBroker
from lakehouse.settings import PREFIX, Settings
from tests.chaos.odds import GLUE_REFUSAL, Odds, glue_commit, rest_commit
from tests.chaos.processes import fork_server, start
from tests.proxy import FaultProxy

SMALL_DISK_MB = 128


@dataclass
class Wire:
    """The way to a service, which can be faulty."""

    url: str
    odds: Odds


@dataclass
class Scene:
    """One catalog's stage. folder: where each round leaves its own folder."""

    kind: Kind
    folder: Path
    kafka: KafkaBroker
    services: LocalServices
    context: ForkServerContext
    catalog: Wire | None = None
    store: Wire | None = None
    small_disk: Path | None = None

    def environments(self, name: str, topic: str) -> tuple[dict[str, str], dict[str, str]]:
        """The settings of a round's own lake: as its writers see it, and past all proxies."""
        plain = self.services.environment(self.kind, name)
        if self.small_disk:
            plain["LAKEHOUSE_HOME"] = str(self.small_disk / name)
        plain |= {"LAKEHOUSE_KAFKA_BOOTSTRAP": self.kafka.bootstrap_servers, "LAKEHOUSE_PRODUCT_TOPIC": topic}
        plain |= self._short_patience() | {"STREAMFORGE_CODE_VERSION": "chaos"}  # else each process asks git
        faulty = dict(plain)
        if self.store:
            faulty["LAKEHOUSE_S3_ENDPOINT"] = self.store.url
        if self.catalog:
            faulty["LAKEHOUSE_GLUE_ENDPOINT" if self.kind == "glue" else "LAKEHOUSE_CATALOG_URI"] = self.catalog.url
        return faulty, plain

    @staticmethod
    def _short_patience() -> dict[str, str]:
        """Small batches and short time limits: a round has seconds, and a fault must find something half done."""
        wanted = {
            "batch_rows": "700",
            "ingest_rows": "700",
            "ingest_seconds": "0.5",
            "ingest_session_seconds": "1.5",
            "ingest_refresh_seconds": "2",
            "catalog_timeout_seconds": "3",
            "s3_timeout_seconds": "3",
            # maintenance finds something to do at once; staged files keep their guard, for a zombie may still commit them
            "compact_files": "4",
            "compact_cold_minutes": "0",
            "expired_files_hours": "0.0005",
        }
        return {PREFIX + name.upper(): value for name, value in wanted.items() if name in Settings.model_fields}

    def lake(self, environment: Mapping[str, str]) -> Lake:
        """The round's lake, opened by the harness."""
        given = {k.removeprefix(PREFIX).lower(): v for k, v in environment.items() if k.startswith(PREFIX)}
        return open_lake(Settings(**given), Run("harness", "chaos"))  # type: ignore[arg-type]

    def filesystem(self, environment: Mapping[str, str]) -> fs.FileSystem | None:
        """How the verifier reads the object store: a client of its own, past all proxies."""
        if self.kind == "sqlite":
            return None
        return fs.S3FileSystem(
            endpoint_override=environment["LAKEHOUSE_S3_ENDPOINT"],
            region=environment["LAKEHOUSE_S3_REGION"],
            access_key=environment["LAKEHOUSE_S3_ACCESS_KEY_ID"],
            secret_key=environment["LAKEHOUSE_S3_SECRET_ACCESS_KEY"],
        )

    def wire_faults(self) -> Counter[str]:
        """What befell requests since the scene began."""
        total: Counter[str] = Counter()
        for name, wire in (("catalog", self.catalog), ("store", self.store)):
            if wire:
                total.update({f"{name} {fault}": n for fault, n in wire.odds.counts.items()})
        return total

    def leave(self, name: str, folder: Path, clean: bool) -> None:
        """After a round: what a failing one left in its folder and on the small disk is kept in its folder, else nothing is."""
        home = self.small_disk / name if self.small_disk else None
        if clean:
            shutil.rmtree(folder)
        elif home and home.exists():
            shutil.copytree(home, folder / "home")
        if home:
            shutil.rmtree(home, ignore_errors=True)

    def fill_disk(self) -> bool:
        """Take all space that is left on the small disk; False if there is none."""
        if self.small_disk is None:
            return False
        with contextlib.suppress(OSError), (self.small_disk / "ballast").open("wb", buffering=0) as file:
            block = bytes(1 << 20)
            try:
                while True:
                    file.write(block)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        return True

    def free_disk(self) -> None:
        """Give it back."""
        if self.small_disk:
            (self.small_disk / "ballast").unlink(missing_ok=True)


@contextmanager
def scene(kind: Kind, folder: Path, kafka: KafkaBroker) -> Iterator[Scene]:
    """Run what rounds on one catalog need."""
    with ExitStack() as stack:
        services = stack.enter_context(local_services(folder / "services", (kind,)))
        made = Scene(kind, folder, kafka, services, fork_server())
        warm = start(made.context, ["settings"], {}, folder / "warm.log")  # the fork server imports once, before any round
        if kind == "sqlite":
            made.small_disk = stack.enter_context(_small_disk(folder / "disk"))
        else:
            sample = services.environment(kind, "sample")
            made.store = _wire(stack, sample["LAKEHOUSE_S3_ENDPOINT"], Odds())
            if kind == "rest":
                made.catalog = _wire(stack, sample["LAKEHOUSE_CATALOG_URI"], Odds(rest_commit))
            else:
                made.catalog = _wire(stack, sample["LAKEHOUSE_GLUE_ENDPOINT"], Odds(glue_commit, GLUE_REFUSAL))
        warm.wait(120)
        yield made


def _wire(stack: ExitStack, upstream: str, odds: Odds) -> Wire:
    proxy = stack.enter_context(FaultProxy(upstream))
    proxy.rule = odds
    return Wire(proxy.url, odds)


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of 128 MB in memory, to be filled; None where this user may not mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MB}m", "chaos", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)
