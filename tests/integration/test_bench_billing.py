"""The billing benchmark at a tiny size, so that it cannot rot."""

from __future__ import annotations

from benchmarks.billing import one_run


def test_it_runs_and_says_what_it_promises() -> None:
    said: list[str] = []
    found = one_run(0.0005, said.append)
    figures = {"seconds_at_1m", "seconds_at_20m", "mb_at_1m", "mb_at_20m", "ratio", "bytes_ratio", "rebuild_events_per_second"}
    figures |= {"cpu_seconds_at_1m", "cpu_seconds_at_20m", "cpu_ratio", "rebuild_cpu_us_per_event", "peak_rss_mb"}
    assert set(found) == figures
    assert all(v > 0 for v in found.values())
    assert any("one batch of 21 events" in line for line in said)
