"""The as-of join: 20 M events against 1 M plan intervals of 100,000 customers, both in no order.

rows_per_second: of `asof_join` as attribution calls it, on frames in memory, from the events as they lie (keys are text of 18
characters, times of 60 days in microseconds) to the frame with two columns of the interval in force, in the order of the events.
Sorting, and looking for overlaps, are in it. cpu_us_per_event: all threads. peak_rss_mb: of the whole process, which made the
events as well. What is found is compared with a plain range join in DuckDB on one event in a thousand.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime

import polars as pl

from benchmarks.measure import peak_rss_mb
from lakehouse.asof import Engine, asof_join

EVENTS, CUSTOMERS, EACH = 20_000_000, 100_000, 10
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
DAY = 86_400_000_000
"""Microseconds."""


def one_run(scale: float, say: Callable[[str], None]) -> dict[str, float]:
    """Make events and intervals, join them, and check a sample; scale shrinks both."""
    events, intervals = _events(int(EVENTS * scale), int(CUSTOMERS * scale)), _intervals(int(CUSTOMERS * scale))
    say(f"{events.height:,} events, {intervals.height:,} intervals")
    began, used = time.perf_counter(), time.process_time()
    found = _joined(events, intervals, "polars")
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    peak = peak_rss_mb(os.getpid())
    say("checking a sample")
    sample = found.gather_every(1000)
    assert sample.equals(_joined(sample.select(events.columns), intervals, "duckdb")), "not what a range join finds"
    return {
        "rows_per_second": round(events.height / seconds),
        "cpu_us_per_event": round(cpu * 1e6 / events.height, 3),
        "peak_rss_mb": round(peak),
    }


def _joined(events: pl.DataFrame, intervals: pl.DataFrame, engine: Engine) -> pl.DataFrame:
    wanted = ["plan", "plan_rank"]
    return asof_join(events, intervals, time="occurred_at", keys=["customer_id"], columns=wanted, engine=engine)


def _customer(number: pl.Expr) -> pl.Expr:
    """Text as Stripe's ids are: 18 characters, in which neighbours have nothing in common."""
    return pl.concat_str(pl.lit("cus_"), number.hash(1).cast(pl.String).str.slice(-14).str.pad_start(14, "0"))


def _events(count: int, customers: int) -> pl.DataFrame:
    """One in a hundred is of a customer that has no interval."""
    number = pl.int_range(count, eager=True).alias("n").to_frame().select(pl.col("n").hash(2), at=pl.col("n").hash(3))
    return number.select(
        customer_id=_customer((pl.col("n") % (customers * 101 // 100)).cast(pl.Int64)),
        occurred_at=(pl.lit(BEGIN) + pl.duration(microseconds=(pl.col("at") % (60 * DAY)).cast(pl.Int64))),
    )


def _intervals(customers: int) -> pl.DataFrame:
    """Ten a customer, six days each from a day of its own on, the last one open."""
    number = pl.int_range(customers * EACH, eager=True).alias("n").to_frame()
    customer, part = pl.col("n") // EACH, pl.col("n") % EACH
    begins = pl.lit(BEGIN) + pl.duration(microseconds=(customer.hash(4) % DAY).cast(pl.Int64) + (part * 6 - 5) * DAY)
    return number.select(
        customer_id=_customer(customer),
        valid_from=begins,
        valid_to=pl.when(part < EACH - 1).then(begins + pl.duration(days=6)),
        plan=pl.lit(pl.Series(["starter", "pro", "enterprise"])).gather(part % 3),
        plan_rank=(part % 3 + 1).cast(pl.Int32),
    ).sample(fraction=1.0, shuffle=True, seed=5)
