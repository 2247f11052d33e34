"""The billing benchmarks at a tiny size, so that they cannot rot."""

from __future__ import annotations

import re

from benchmarks import ledger
from benchmarks.billing import one_run


def test_it_runs_and_says_what_it_promises() -> None:
    said: list[str] = []
    found = one_run(0.0005, said.append)
    figures = {"seconds_at_1m", "seconds_at_20m", "mb_at_1m", "mb_at_20m", "ratio", "bytes_ratio", "rebuild_events_per_second"}
    figures |= {"cpu_seconds_at_1m", "cpu_seconds_at_20m", "cpu_ratio", "rebuild_cpu_us_per_event", "peak_rss_mb"}
    assert set(found) == figures
    assert all(v > 0 for v in found.values())
    assert any("one batch of 21 events" in line for line in said)


def test_the_ledger_benchmark_too() -> None:
    said: list[str] = []
    found = ledger.one_run(0.01, said.append)
    figures = {f"{figure}_at_{size}" for figure in ("seconds", "cpu_seconds", "mb") for size in ("200k", "4m")}
    assert set(found) == figures | {"ratio", "cpu_ratio", "bytes_ratio"}
    assert all(v > 0 for v in found.values())
    assert any("one batch of 42 events on 40,000 versions" in line for line in said)
    parts = [line for line in said if "'billing.revenue_ledger'" in line]
    assert len(parts) == 2
    for line in parts:
        written = {name: int(count) for name, count in re.findall(r"(billing\.\w+)': '[^']* (\d+) rows", line)}
        assert set(written) == set(ledger.TABLES)
        assert written["billing.revenue_ledger"] == 26  # of 42 events that many are of money: a posting each
        assert min(written.values()) > 0
