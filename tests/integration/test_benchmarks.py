"""The benchmarks of product events, very small: so that they cannot rot. What they measure at this size means nothing."""

from __future__ import annotations

from benchmarks import asof, clean, freshness, ingest, repair


def test_ingest_holds_every_event_and_reports_its_figures() -> None:
    run = ingest.one_run(0.001, lambda _: None)
    assert run["events"] == 5_000
    assert {"events_per_second", "cpu_us_per_event", "peak_rss_mb"} <= run.keys()
    assert all(value > 0 for name, value in run.items() if name != "apache_kafka")


def test_freshness_counts_every_row() -> None:
    run = freshness.one_run(0.02, lambda _: None)
    assert 0 < run["p50_seconds"] <= run["p95_seconds"] <= run["p99_seconds"]


def test_clean_counts_each_event_once_and_reports_its_figures() -> None:
    run = clean.one_run(0.0005, lambda _: None)
    assert run.keys() == {
        "events_per_second", "cpu_us_per_event", "peak_rss_mb", "seconds_at_20m_ids", "seconds_at_200m_ids", "ratio",
    }  # fmt: skip
    assert all(value > 0 for value in run.values())


def test_asof_finds_what_a_range_join_finds_and_reports_its_figures() -> None:
    run = asof.one_run(0.001, lambda _: None)
    assert run.keys() == {"rows_per_second", "cpu_us_per_event", "peak_rss_mb"}
    assert all(value > 0 for value in run.values())


def test_repair_rewrites_what_changed_and_reports_its_figures() -> None:
    run = repair.one_run(0.001, lambda _: None)
    figures = ("seconds", "cpu_seconds", "files", "mb", "rows_changed", "amplification")
    assert run.keys() == {f"{case}_{figure}" for case in ("hour", "thousandth", "hundredth", "tenth") for figure in figures}
    assert run["hour_files"] <= 1
    assert run["tenth_files"] > 0
