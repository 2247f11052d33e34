"""Real services on this machine's loopback interface: the object store and Iceberg catalogs that the `local` profile runs on.

Each gives the LAKEHOUSE_* environment variables with which any process reaches it, so tests, benchmarks and commands open a
lake on SQLite, on an Iceberg REST catalog or on Glue in the same way:

    with local_services(folder) as services:
        environment = services.environment("rest", "lake-1")   # an empty lake of that name
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lakehouse.local.glue import GlueServer
from lakehouse.local.seaweedfs import SeaweedFS

Kind = Literal["sqlite", "rest", "glue"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GLUE_BUCKET = "warehouse"


@dataclass(frozen=True)
class LocalServices:
    """What runs: None is a service that was not asked for. `folder` holds their data and logs."""

    folder: Path
    store: SeaweedFS | None
    glue: GlueServer | None

    def environment(self, kind: Kind, name: str) -> dict[str, str]:
        """The settings of an empty lake of its own on one of the catalogs; asked again for a name, the same lake.

        name: lower case letters, digits and hyphens, 3 to 40 of them: it becomes a folder, a bucket or a region.
        """
        home = {"LAKEHOUSE_HOME": str(self.folder / "homes" / f"{kind}-{name}")}
        if kind == "sqlite":
            return home
        assert self.store, f"the catalog {kind!r} needs the object store"
        store = home | self.store.environment()
        if kind == "rest":
            self.store.make_table_bucket(name)
            return store | {
                "LAKEHOUSE_CATALOG_URI": self.store.catalog_uri,
                "LAKEHOUSE_CATALOG_CREDENTIAL": f"{self.store.access_key_id}:{self.store.secret_access_key}",
                "LAKEHOUSE_WAREHOUSE": f"s3://{name}",
            }
        assert self.glue, "Glue was not started"
        return store | {
            "LAKEHOUSE_CATALOG_URI": "glue:",
            "LAKEHOUSE_GLUE_ENDPOINT": self.glue.endpoint,
            "LAKEHOUSE_GLUE_REGION": name,  # Glue has one catalog for each account and region
            "LAKEHOUSE_WAREHOUSE": f"s3://{GLUE_BUCKET}/{name}",
        }


@contextmanager
def local_services(folder: Path, kinds: tuple[Kind, ...] = KINDS) -> Iterator[LocalServices]:
    """Run what the catalogs in `kinds` need while the context is open; they end with this process, however it ends.

    Raises:
        UsageError: a service is not installed. Terminal: one does not start; the message shows the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        glue = GlueServer(folder / "glue") if "glue" in kinds else None
        store = SeaweedFS(folder / "seaweedfs", buckets=(GLUE_BUCKET,)) if set(kinds) & {"rest", "glue"} else None
        running = [service for service in (glue, store) if service is not None]
        for service in running:  # all begin at once, and are waited for after
            stack.callback(service.stop)
            service.launch()
        for service in running:
            service.wait_until_ready()
        yield LocalServices(folder, store, glue)
