"""The parts of the project that the machine uses without importing them: found through entry points, called by protocol.

`lakehouse` imports no sibling (a linter checks it). The writers and the simulator announce themselves in pyproject.toml
under the entry point group `lakehouse.parts`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast

import pyarrow as pa

from lakehouse.errors import Terminal
from lakehouse.lake import Lake
from lakehouse.services import Services
from lakehouse.settings import Settings


class Writers(Protocol):
    """What `writers.jobs` offers."""

    SOURCES: Sequence[str]
    """The raw tables that writers fill."""
    CRM_SOURCES: Sequence[str]
    """Those of them that are read from the CRM."""

    def ingest(
        self,
        lake: Lake,
        services: Services,
        names: Sequence[str] = (),
        on_batch: Callable[[Any], None] | None = None,
        seen_at: datetime | None = None,
    ) -> list[Any]:
        """Bring every source (or those named) up to date; returns the batches committed."""

    def follow(
        self,
        lake: Lake,
        services: Services,
        stop: threading.Event,
        names: Sequence[str] = (),
        on_batch: Callable[[Any], None] | None = None,
    ) -> None:
        """Bring Kafka topics (default: all) to their tables until `stop` is set."""

    def standings(self, lake: Lake, services: Services, name: str) -> Sequence[Any]:
        """Where a raw table stands in each partition of its topic; see writers.positions.Standing."""

    def set_positions(
        self,
        lake: Lake,
        services: Services,
        name: str,
        partitions: list[int],
        to: int | str,
        why: str,
        *,
        again: bool = False,
        skip: bool = False,
    ) -> Sequence[Any]:
        """Set partitions (none: all) to an offset, by hand; returns where they stand then."""

    def ingest_crm(self, lake: Lake, url: str, seen_at: datetime | None = None) -> list[Any]:
        """Poll the CRM's tables once; returns the batches committed."""

    def reconcile(
        self,
        lake: Lake,
        services: Services | None,
        *,
        account: str | None = None,
        since: datetime | None = None,
        events: bool = True,
        objects: Sequence[str] = (),
        say: Callable[[str, int, int], None] = lambda *_: None,
    ) -> Any:
        """Compare one Stripe account with the lake; with services, repair what differs."""

    def compare_vendor(
        self,
        lake: Lake,
        folder: Path,
        *,
        account: str | None = None,
        dry_run: bool = False,
        say: Callable[[str, int, int], None] = lambda *_: None,
    ) -> dict[str, Any]:
        """Compare the tables that the vendor's connector exported with ours: {table: what was found}."""

    def receiver(self, settings: Settings, services: Services, clock: Callable[[], float]) -> AbstractContextManager[str]:
        """Run the webhook receiver while the context is open; gives the URL to post to."""


class Simulator(Protocol):
    """What `simulator.demo` offers."""

    def play(
        self,
        folder: Path,
        services: Callable[[Callable[[], float]], AbstractContextManager[Services]],
        after_day: Callable[[datetime], None],
        after_round: Callable[[Services, datetime], None],
        **options: Any,
    ) -> dict[str, Any]:
        """Play what was not played yet of a world, day by day; see simulator.demo."""

    def stripe_api(self, folder: Path, *, port: int, **faults: Any) -> AbstractContextManager[tuple[str, str]]:
        """Serve a played world's Stripe account over HTTP while the context is open; gives its URL and an API key."""

    def verify(self, folder: Path, query: Callable[[str], pa.Table]) -> dict[str, Any]:
        """Compare what the lake holds with the truth of the world; see `lakehouse verify`."""

    def first_attribution(
        self, folder: Path, first_written: Callable[[str, Sequence[str]], Iterable[pa.Table]]
    ) -> dict[str, Any]:
        """Compare the events as they were first written; see `lakehouse verify --first`."""


class Benchmarks(Protocol):
    """What `benchmarks.suite` offers."""

    NAMES: Sequence[str]
    """The benchmarks, by name."""

    def describe(self) -> dict[str, str]:
        """{name: what it measures}."""

    def run(self, name: str, runs: int, scale: float, say: Callable[[str], None]) -> dict[str, Any]:
        """Run one several times: {"benchmark": name, "median": {figure: ...}, "runs": [...]}."""


def _load(name: str) -> Any:
    for entry in entry_points(group="lakehouse.parts", name=name):
        return entry.load()
    raise Terminal(f"the part {name!r} is not installed; install the project again: make setup")


def writers() -> Writers:
    """The writers."""
    return cast(Writers, _load("writers"))


def simulator() -> Simulator:
    """The simulator."""
    return cast(Simulator, _load("simulator"))


def benchmarks() -> Benchmarks:
    """The benchmarks."""
    return cast(Benchmarks, _load("benchmarks"))
