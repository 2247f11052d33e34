"""Any interleaving of writers, maintenance, tags, rollbacks and crashes leaves rows, positions and kept snapshots whole."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lakehouse.append import append_rows
from lakehouse.declarations import KeepSnapshots
from lakehouse.lake import Lake, Run, history, open_lake
from lakehouse.maintenance import expire as expiry
from lakehouse.maintenance import orphans, tags
from lakehouse.maintenance.compact import compact
from lakehouse.maintenance.manifests import rewrite_manifests
from lakehouse.rollback import rollback_table
from lakehouse.settings import Settings
from tests.conftest import DECLARATIONS

RAW, TOPIC = "raw.records", "t"
DAY = datetime(2026, 3, 1, tzinfo=UTC)
STEPS = ("expire", "compact", "manifests", "orphans")
Rows = frozenset[tuple[int, int]]


class Killed(BaseException):
    """Nothing may catch it, as nothing catches SIGKILL."""


@contextmanager
def killed_at(lake: Lake, moment: int | None) -> Iterator[None]:
    """The process dies at the moment-th of: before and after each request to the catalog, each removal, each record."""
    left = [moment if moment is not None else -1]

    def reached() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            reached()
            found = real(*args, **more)
            reached()
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lake.catalog, "commit_table", around(lake.catalog.commit_table))
        patch.setattr("lakehouse.files._remove", around(__import__("lakehouse.files").files._remove))
        patch.setattr(expiry, "_write_down", around(expiry._write_down))
        yield


class Maintained(RuleBasedStateMachine):
    """One raw table, its writer and its maintenance; what it must hold, in plain sets."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="maintained-"))
        for place, text in DECLARATIONS.items():
            (self.folder / "catalog" / place).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / "catalog" / place).write_text(text, "utf-8")
        chosen = Settings(
            home=self.folder / "home",
            catalog_dir=self.folder / "catalog",
            compact_cold_minutes=0,
            compact_days=10_000,
            compact_files=3,
        )
        self.lake = open_lake(chosen, Run("one", "test"))
        self.lake.open_for_write(RAW)
        self.rows: Rows = frozenset()
        self.reached = {0: 0, 1: 0}
        self.expected: dict[int, tuple[Rows, dict[int, int]]] = {}
        self.tagged: dict[str, int] = {}
        for partition in (0, 1, 0):
            self._append(partition, 1)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    @rule(partition=st.sampled_from([0, 1]), count=st.integers(1, 3))
    def append(self, partition: int, count: int) -> None:
        self._append(partition, count)

    def _append(self, partition: int, count: int) -> None:
        begin = self.reached[partition]
        offsets = list(range(begin, begin + count))
        rows = {
            "topic": pa.array([TOPIC] * count, pa.string()),
            "partition": pa.array([partition] * count, pa.int32()),
            "offset": pa.array(offsets, pa.int64()),
            "received_at": pa.array([DAY] * count, pa.timestamp("us", "UTC")),
        }
        key = (TOPIC, partition)
        append_rows(self.lake, RAW, pa.table(rows), {key: begin}, {key: begin + count})
        self.rows |= {(partition, o) for o in offsets}
        self.reached[partition] += count
        self.remember()

    @rule(step=st.sampled_from(STEPS), at_least=st.integers(1, 3), moment=st.none() | st.integers(1, 8))
    def maintain(self, step: str, at_least: int, moment: int | None) -> None:
        later = int(time.time() * 1000) + 3_600_000
        keep = KeepSnapshots(at_least, at_least, 0)

        def act() -> None:
            table = self.lake.load(RAW)
            if step == "expire":
                expiry.expire(table, self.lake.run, keep, ())
                expiry.remove_expired_files(table, 0)
            elif step == "compact":
                compact(self.lake, self.lake.declaration(RAW), table)
            elif step == "manifests":
                rewrite_manifests(table, self.lake.run)
            elif table.current_snapshot() is not None:
                orphans.remove_orphans(table, self.lake.run, self.lake.settings, 0, later)

        try:
            with killed_at(self.lake, moment):
                act()
        except Killed:
            self.remember()
            self.whole()
            act()  # a second run finishes the job
        self.remember()

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), name=st.sampled_from(["a", "b"]))
    def tag(self, data: st.DataObject, name: str) -> None:
        if name in self.tagged:
            tags.remove_tag(self.lake, RAW, name)
            del self.tagged[name]
        else:
            kept = sorted(s.snapshot_id for s in self.lake.load(RAW).snapshots())
            self.tagged[name] = tags.tag_snapshot(self.lake, RAW, name, data.draw(st.sampled_from(kept)))
        self.remember()

    @precondition(lambda self: any(self.reached.values()))
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        goal = data.draw(st.sampled_from([s.snapshot_id for s in history(self.lake.load(RAW))]))
        rollback_table(self.lake, RAW, goal)
        self.rows, reached = self.expected[goal]
        self.reached = dict(reached)

    def remember(self) -> None:
        """Snapshots that are new hold what the table must hold now."""
        for snapshot in self.lake.load(RAW).snapshots():
            self.expected.setdefault(snapshot.snapshot_id, (self.rows, dict(self.reached)))

    @invariant()
    def whole(self) -> None:
        if not hasattr(self, "lake"):
            return
        table = self.lake.load(RAW)
        kept = {s.snapshot_id for s in table.snapshots()}
        assert set(self.tagged.values()) <= kept
        assert {n: r.snapshot_id for n, r in table.metadata.refs.items() if n != "main"} == self.tagged
        for snapshot in kept:
            held = table.scan(snapshot_id=snapshot, selected_fields=("partition", "offset")).to_arrow()
            found = list(zip(held["partition"].to_pylist(), held["offset"].to_pylist(), strict=True))
            assert sorted(found) == sorted(self.expected[snapshot][0])
        if table.current_snapshot() is not None:
            held = table.scan(selected_fields=("partition", "offset")).to_arrow()
            assert sorted(zip(held["partition"].to_pylist(), held["offset"].to_pylist(), strict=True)) == sorted(self.rows)
        vector = self.lake.vector(RAW)
        assert {p: vector.get((TOPIC, p), 0) for p in self.reached} == self.reached


Maintained.TestCase.settings = settings(max_examples=6, stateful_step_count=25)
TestMaintained = Maintained.TestCase
