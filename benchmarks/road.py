"""The whole road, timed: `python -m benchmarks.road` plays the demo's world several times, each in a home of its own.

Prints {"benchmark": "road", "median": {...}, "runs": [{...}, ...]} on stdout, with for each run: seconds (wall), cpu_seconds
(the command and the broker it starts, user + system), peak_rss_mb (the command alone), events (unique product events).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time


def one_run(events: int) -> dict[str, float]:
    """Play the world once; CPU time includes the processes it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        command = [sys.executable, "-c", "from lakehouse.cli import main; main()", "demo", "--json", "--events", str(events)]
        done = subprocess.run(
            command, env=os.environ | {"LAKEHOUSE_HOME": home}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    verdict = json.loads(done.stdout)["verify"]
    assert not verdict["problems"], "a run that is wrong has no speed"
    return {
        "events": verdict["product_events"]["unique"],
        "seconds": round(time.monotonic() - started, 2),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "peak_rss_mb": round(after.ru_maxrss / 1024),  # the largest child so far, hence of the run or an earlier one
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="how many runs (default 3)")
    parser.add_argument("--events", type=int, default=520_000, help="unique product events (default 520000)")
    arguments = parser.parse_args()
    runs = []
    for number in range(arguments.runs):
        runs.append(one_run(arguments.events))
        print(f"run {number + 1} of {arguments.runs}: {runs[-1]}", file=sys.stderr)
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    json.dump({"benchmark": "road", "median": median, "runs": runs}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
