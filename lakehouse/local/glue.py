"""AWS Glue's data catalog by moto, in a process of its own, with the version check that makes a commit a compare-and-swap.

moto ignores `UpdateTable`'s VersionId, so of two commits on one version the later would silently win; Glue refuses it with
ConcurrentModificationException. tests/integration/test_catalogs.py shows both. All is in memory: each start is an empty
catalog. One process serves many catalogs, since Glue has one for each account and region, and any region name goes.

    python -m lakehouse.local.glue PORT
"""

from __future__ import annotations

import os
import sys
import threading
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lakehouse.errors import UsageError
from lakehouse.processes import HOST, Child, free_ports

START_SECONDS = 20.0


class GlueServer:
    """Glue on 127.0.0.1, from `start()` (or `with`) to `stop()`.

    Args:
        folder: where `moto.log` goes.
        version_check: False is moto as it comes, which loses commits: to show that a test would notice.
    """

    def __init__(self, folder: Path, version_check: bool = True) -> None:
        self._folder = folder.absolute()
        self._child = Child("Glue (moto)", self._folder / "moto.log")
        self._version_check = version_check
        self._port = 0

    @property
    def endpoint(self) -> str:
        """URL of the API."""
        return f"http://{HOST}:{self._port}"

    def __enter__(self) -> GlueServer:
        self.launch()
        self.wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def launch(self) -> None:
        """Start it; see `wait_until_ready`.

        Raises:
            UsageError: moto is not installed.
        """
        if find_spec("moto") is None or find_spec("flask") is None:
            raise UsageError("moto is not installed; run: pip install 'streamforge-lakehouse[local]'")
        (self._port,) = free_ports(1)
        self._folder.mkdir(parents=True, exist_ok=True)
        root = Path(__file__).resolve().parent.parent.parent
        environment = {"PYTHONPATH": str(root), "MOTO_ALLOW_NONEXISTENT_REGION": "true"}
        flags = [] if self._version_check else ["--stock"]
        self._child.launch([sys.executable, "-m", "lakehouse.local.glue", str(self._port), *flags], environment, self._folder)

    def wait_until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            Terminal: it does not within 20 s, or ends at once; with the end of its log.
        """
        self._child.wait_until(self._answers, START_SECONDS)

    def stop(self) -> None:
        """Stop it; what it knew is gone. Safe to call twice."""
        self._child.kill()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/moto-api/data.json", timeout=1.0):  # noqa: S310 - http, ours
                return True
        except OSError:
            return False


def _check_versions() -> None:
    """Make moto's `update_table` refuse a stale VersionId, and forget the version it replaces if it may (SkipArchive)."""
    from moto.glue.exceptions import GlueClientError
    from moto.glue.responses import GlueResponse

    stock = GlueResponse.update_table
    lock = threading.Lock()

    def update_table(self: Any) -> Any:
        database, name = self.parameters.get("DatabaseName"), self.parameters["TableInput"]["Name"]
        with lock:
            table = self.glue_backend.get_table(database, name)
            present, named = str(table._current_version), self.parameters.get("VersionId")
            if named is not None and named != present:
                raise GlueClientError(
                    "ConcurrentModificationException",
                    f"Update table failed due to concurrent modifications: {named}, now {present}",
                )
            done = stock(self)
            if self.parameters.get("SkipArchive"):
                table.versions.pop(present, None)
            return done

    GlueResponse.update_table = update_table  # type: ignore[method-assign]


def _serve(port: int, version_check: bool) -> None:
    from moto.server import main

    if version_check:
        _check_versions()
    main(["-H", HOST, "-p", str(port)])


if __name__ == "__main__":
    os.environ.setdefault("MOTO_ALLOW_NONEXISTENT_REGION", "true")
    _serve(int(sys.argv[1]), "--stock" not in sys.argv[2:])
