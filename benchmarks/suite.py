"""The benchmarks by name, how a run is repeated, and what it reports: medians of several runs, CPU time beside wall time.

A benchmark is a module of this folder with `one_run(scale, say) -> {figure: number}`; its first docstring line says what it
measures. scale: a fraction of the full size, for a quick look; say: progress, one line of text at a time.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from types import ModuleType
from typing import Any

NAMES = ("webhooks", "ingest", "freshness", "commits", "billing", "ledger", "clean", "asof", "repair", "marts", "road")
"""In the order in which the lakehouse does the work."""


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def describe() -> dict[str, str]:
    """{name: what it measures}, from the first line of each module."""
    return {name: (_module(name).__doc__ or "").splitlines()[0].rstrip(".") for name in NAMES}


def run(name: str, runs: int, scale: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Run one benchmark several times: {"benchmark": name, "median": {figure: ...}, "runs": [{figure: ...}, ...]}."""
    module, found = _module(name), []
    for number in range(1, runs + 1):
        prefix = f"{name}, run {number} of {runs}"
        say(prefix)
        found.append(module.one_run(scale, lambda text, prefix=prefix: say(f"{prefix}: {text}")))
    median = {figure: round(statistics.median(run[figure] for run in found), 3) for figure in found[0]}
    return {"benchmark": name, "median": median, "runs": found}
