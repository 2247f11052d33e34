"""A writer's commits, the 50th and the 5,000th: what a commit costs must not grow with what came before.

Each is an append at position of one small file to `raw.product_events` (12 Kafka partitions advance), as a writer makes it.
Maintenance runs as in production: a commit every 10 s, snapshots expired every 5 minutes (30 commits) and all steps every
hour (360), by the declared policy. Figures: ms_at_N, the median of the 20 commits around the Nth (wall time of `commit()`;
staging the file is not in it), cpu_ms_at_N the same in CPU time; ratio of the two; ms_p50, ms_p99, cpu_ms_p99 of all;
maintenance_share, its CPU time over that of the commits; what is left at the end. Every run counts the rows it wrote.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa

from lakehouse.commit import Change, commit
from lakehouse.lake import open_lake
from lakehouse.maintenance.run import maintain
from lakehouse.settings import Settings
from lakehouse.staging import stage

TABLE, TOPIC, PARTITIONS = "raw.product_events", "product.events", 12
COMMITS, EARLY = 5_000, 50
BETWEEN_EXPIRY, BETWEEN_MAINTENANCE = 30, 360
BEGIN = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)


def batch(number: int) -> pa.Table:
    """A row for each Kafka partition, ten seconds after the batch before."""
    at = [BEGIN + timedelta(seconds=10 * number)] * PARTITIONS
    return pa.table(
        {
            "topic": pa.array([TOPIC] * PARTITIONS, pa.string()),
            "partition": pa.array(range(PARTITIONS), pa.int32()),
            "offset": pa.array([number] * PARTITIONS, pa.int64()),
            "payload": pa.array([f'{{"event_id": "{number}-{p}"}}'.encode() for p in range(PARTITIONS)], pa.binary()),
            "received_at": pa.array(at, pa.timestamp("us", "UTC")),
        }
    )


def one_run(scale: float, say: Callable[[str], None]) -> dict[str, float]:
    """Commit 5,000 times (by the scale) to a table of its own."""
    late = max(2 * EARLY, int(COMMITS * scale))
    took: list[float] = []
    cpu: list[float] = []
    maintenance = 0.0
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        lake = open_lake(Settings(home=Path(home)))  # type: ignore[call-arg]
        table, declared = lake.open_for_write(TABLE), lake.declaration(TABLE)
        for number in range(late + 10):
            files = stage(table, declared, batch(number))
            expected = {(TOPIC, p): number for p in range(PARTITIONS)}
            change = Change(TABLE, expected, dict.fromkeys(expected, number + 1), add=files, sources={TOPIC: "cluster/topic"})
            began, used = time.perf_counter(), time.process_time()
            commit(table, lake.run, change)
            took.append((time.perf_counter() - began) * 1000)
            cpu.append((time.process_time() - used) * 1000)
            if (number + 1) % BETWEEN_EXPIRY == 0:
                steps = [] if (number + 1) % BETWEEN_MAINTENANCE == 0 else ["expire"]
                used = time.process_time()
                for report in maintain(lake, [TABLE], steps):
                    assert report.problem is None, report
                maintenance += (time.process_time() - used) * 1000
                say(f"{number + 1:,} commits, the last at {statistics.median(took[-20:]):.0f} ms")
        table.refresh()
        held = table.scan(selected_fields=("partition", "offset")).to_arrow()
        assert held.num_rows == held.group_by(["partition", "offset"]).aggregate([]).num_rows == (late + 10) * PARTITIONS
        current = table.current_snapshot()
        assert current is not None
        left = {
            "snapshots": len(table.metadata.snapshots),
            "manifests": len(current.manifests(table.io)),
            "data_files": sum(1 for _ in table.scan().plan_files()),
        }
    return {
        **{f"ms_at_{n}": round(_around(took, at), 2) for n, at in ((EARLY, EARLY), (COMMITS, late))},
        "ratio": round(_around(took, late) / _around(took, EARLY), 3),
        **{f"cpu_ms_at_{n}": round(_around(cpu, at), 2) for n, at in ((EARLY, EARLY), (COMMITS, late))},
        "cpu_ratio": round(_around(cpu, late) / _around(cpu, EARLY), 3),
        "ms_p50": round(statistics.median(took), 2),
        "ms_p99": round(sorted(took)[len(took) * 99 // 100], 2),
        "cpu_ms_p99": round(sorted(cpu)[len(cpu) * 99 // 100], 2),
        "maintenance_share": round(maintenance / sum(cpu), 3),
        "commits": late,
        **left,
    }


def _around(took: list[float], at: int) -> float:
    """The median of the 20 commits around one."""
    return statistics.median(took[at - 10 : at + 10])
