"""A day of news in the marts: the touched days computed again, against all of them.

A world of 520,000 product events over 60 days and 150 customers is in the lake up to its last day but one; then comes that day,
with what came late. Each mart by periods is built from it twice, on the same inputs: by what the day touches, and (after a
rollback) whole; both must hold the same rows. Figures: seconds of both, ratio (whole by periods), and the rows that the
transforms were given and wrote, of the marts together (`<mart>_...` of each).
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa

from lakehouse import transforms
from lakehouse.append import append_rows
from lakehouse.builds import by_period
from lakehouse.lake import Lake, open_lake
from lakehouse.plans import count_rows
from lakehouse.positions import NUMBERED_HERE, vector_of
from lakehouse.queries import connect, query, quote
from lakehouse.rollback import rollback_table
from lakehouse.runner import run, run_table
from lakehouse.settings import Settings
from simulator.world import World, WorldConfig, build_world
from writers.records import RAW_SCHEMA, received_by_kafka
from writers.stripe import with_envelope

EVENTS = 520_000


def one_run(scale: float, say: Callable[[str], None]) -> dict[str, float]:
    """Lay the world down, bring the last day, and build each mart both ways."""
    world = build_world(WorldConfig(product_events=int(EVENTS * scale)))
    last = world.start + timedelta(days=world.config.days - 1)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        lake = open_lake(Settings(home=Path(home)))  # type: ignore[call-arg]
        say("laying down")
        _feed(lake, world, world.start, last)
        run(lake)
        say("the last day")
        _feed(lake, world, last, last + timedelta(days=1))
        loaded = transforms.load_transforms(lake.settings.transforms_dir, lake.declarations)
        names = [name for name in loaded if lake.declaration(name).build.mode == "periods"]
        for name in loaded:
            if name not in names:
                while not run_table(lake, name, loaded).caught_up:
                    pass
                continue
            say(name)
            before = lake.load(name).current_snapshot()
            assert before
            some = _built(lake, name)
            content = _content(lake, name)
            rollback_table(lake, name, before.snapshot_id)
            with _made_otherwise():
                whole = _built(lake, name)
            assert _content(lake, name) == content, f"{name}: not what a rebuild gives"
            for kind, found in (("periods", some), ("whole", whole)):
                for figure, value in zip(("seconds", "rows_read", "rows_written"), found, strict=True):
                    figures[f"{kind}_{figure}"] = figures.get(f"{kind}_{figure}", 0) + value
                    figures[f"{name.partition('.')[2]}_{kind}_{figure}"] = round(value, 3)
    figures["ratio"] = figures["whole_seconds"] / figures["periods_seconds"]
    return {figure: round(value, 3) for figure, value in figures.items()}


def _built(lake: Lake, name: str) -> tuple[float, int, int]:
    """(seconds, rows that the transform was given, rows written) of one build."""
    given: list[int] = []
    build = transforms.Transform.build

    def counted(self: transforms.Transform, inputs: transforms.Inputs) -> transforms.Built:
        started = time.perf_counter()
        given.extend(count_rows(inputs.connection, quote(source)) for source in self.inputs)
        counting.append(time.perf_counter() - started)
        return build(self, inputs)

    counting: list[float] = []
    transforms.Transform.build = counted  # type: ignore[method-assign]
    try:
        started = time.perf_counter()
        report = run_table(lake, name)
        seconds = time.perf_counter() - started - sum(counting)
    finally:
        transforms.Transform.build = build  # type: ignore[method-assign]
    return seconds, sum(given), report.rows


@contextmanager
def _made_otherwise() -> Iterator[None]:
    """As if the mart had been made by other code: then it is built whole."""
    recipe = by_period.recipe
    by_period.recipe = lambda plan: f"{recipe(plan)}+"
    try:
        yield
    finally:
        by_period.recipe = recipe


def _content(lake: Lake, name: str) -> str:
    rows = query(lake, f"SELECT * FROM {name} ORDER BY ALL")
    return hashlib.sha256(repr(rows.to_pylist()).encode()).hexdigest()


def _feed(lake: Lake, world: World, start: datetime, end: datetime) -> None:
    """Commit what the world sends in [start, end) to the raw tables."""
    first, last = start.timestamp(), end.timestamp()
    times = [d.deliver_at for d in world.stripe_deliveries]
    due = world.stripe_deliveries[bisect_left(times, first) : bisect_left(times, last)]
    received = [datetime.fromtimestamp(d.deliver_at, UTC) for d in due]
    with connect(lake.settings) as connection:
        _append(lake, "raw.stripe_events", with_envelope(connection, _records([d.body for d in due], received)))
    changes = [c for c in world.crm_changes if start <= c.visible_at < end]
    n = len(changes)
    crm = {
        "topic": ["crm"] * n,
        "partition": pa.array([0] * n, pa.int32()),
        "offset": pa.array([0] * n, pa.int64()),
        "received_at": pa.array([c.visible_at for c in changes], pa.timestamp("us", "UTC")),
        "workspace_id": pa.array([c.workspace_id for c in changes], pa.string()),
        "customer_id": pa.array([c.stripe_customer_id for c in changes], pa.string()),
        "mapping_id": pa.array([None] * n, pa.string()),
        "effective_at": pa.array([c.effective_at for c in changes], pa.timestamp("us", "UTC")),
        "updated_at": pa.array([c.visible_at for c in changes], pa.timestamp("us", "UTC")),
        "deleted": pa.array([c.deleted for c in changes], pa.bool_()),
    }
    _append(lake, "raw.crm_workspaces", pa.table(crm), NUMBERED_HERE)
    for table in world.product_records.slices(round(first * 1000), round(last * 1000)):
        times_ms = table["received_at"].cast(pa.timestamp("ms", "UTC")).cast(pa.timestamp("us", "UTC"))
        _append(lake, "raw.product_events", received_by_kafka(_records(table["payload"].to_pylist(), times_ms)))


def _records(payloads: list[bytes], received: list[datetime] | pa.ChunkedArray) -> pa.Table:
    n = len(payloads)
    return pa.table([["records"] * n, [0] * n, [0] * n, received, [None] * n, [[]] * n, payloads], schema=RAW_SCHEMA)


def _append(lake: Lake, name: str, rows: pa.Table, source: str = "bench/topic") -> None:
    """Append rows at the end of the table's topic."""
    topic = f"{name.partition('.')[2]}"
    start = vector_of(lake.open_for_write(name).metadata, name).get((topic, 0), 0)
    offsets = pa.array(range(start, start + rows.num_rows), pa.int64())
    rows = rows.set_column(rows.column_names.index("offset"), "offset", offsets)
    rows = rows.set_column(rows.column_names.index("topic"), "topic", pa.array([topic] * rows.num_rows, pa.string()))
    append_rows(lake, name, rows, {(topic, 0): start}, {(topic, 0): start + rows.num_rows}, {topic: source})
