"""The whole road: the demo's world, from the command to the verdict.

Figures of a run: seconds (wall), cpu_seconds (the command and the broker it starts, user + system), peak_rss_mb (the command
alone), events (unique product events). Every run is compared with the truth: one that is wrong has no speed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from benchmarks.measure import children_cpu_seconds, children_peak_rss_mb

EVENTS = 520_000


def one_run(scale: float, _say: Callable[[str], None]) -> dict[str, float]:
    """Play the world once, in a home of its own."""
    cpu, started = children_cpu_seconds(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        command = [sys.executable, "-m", "lakehouse", "demo", "--json", "--events", str(int(EVENTS * scale))]
        done = subprocess.run(
            command, env=os.environ | {"LAKEHOUSE_HOME": home}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
    verdict = json.loads(done.stdout)["verify"]
    assert not verdict["problems"], verdict["problems"]
    return {
        "events": verdict["product_events"]["unique"],
        "seconds": round(time.monotonic() - started, 2),
        "cpu_seconds": round(children_cpu_seconds() - cpu, 2),
        "peak_rss_mb": round(children_peak_rss_mb()),
    }
