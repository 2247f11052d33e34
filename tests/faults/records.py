"""Rows for the small lake of tests/conftest.py, what the tables hold, and a wire to the Iceberg catalog that can fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.fs import FileSelector
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.io import load_file_io
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from lakehouse.commit import Change, Committed, commit, scope_of
from lakehouse.lake import Lake
from lakehouse.positions import vector_of
from lakehouse.settings import PREFIX, Settings
from lakehouse.staging import stage
from tests.proxy import Answer, FaultProxy, Request

RAW, THINGS, TOPIC = "raw.records", "billing.things", "events"
DAY = datetime(2026, 3, 1, tzinfo=UTC)


def records(partition: int, start: int, stop: int, day: datetime = DAY, value: str = "v") -> pa.Table:
    """Raw rows with offsets `start` up to `stop` of one partition."""
    offsets = list(range(start, stop))
    return pa.table(
        {
            "topic": pa.array([TOPIC] * len(offsets), pa.string()),
            "partition": pa.array([partition] * len(offsets), pa.int32()),
            "offset": pa.array(offsets, pa.int64()),
            "received_at": pa.array([day + timedelta(seconds=o) for o in offsets], pa.timestamp("us", "UTC")),
            "value": pa.array([value] * len(offsets), pa.string()),
        }
    )


def things(*rows: Mapping[str, Any]) -> pa.Table:
    """Rows of billing.things; what a row leaves out is given a value that keeps the rules."""
    full = [{"thing_id": "t1", "region": "eu", "status": "on", "amount": 1} | dict(row) for row in rows]
    schema = pa.schema([("thing_id", pa.string()), ("region", pa.string()), ("status", pa.string()), ("amount", pa.int64())])
    return pa.Table.from_pylist(full, schema)


def append_change(
    lake: Lake, table: Table, partition: int, start: int, stop: int, files: Sequence[DataFile] | None = None
) -> Change:
    """Append at position: offsets `start` up to `stop`, staged now unless `files` are given."""
    if files is None:
        files = stage(table, lake.declaration(RAW), records(partition, start, stop))
    return Change(RAW, {(TOPIC, partition): start}, {(TOPIC, partition): stop}, add=files, sources={TOPIC: "cluster/topic-id"})


def append(lake: Lake, partition: int, start: int, stop: int) -> Committed:
    """Append offsets `start` up to `stop` of a partition to raw.records."""
    table = lake.open_for_write(RAW)
    return commit(table, lake.run, append_change(lake, table, partition, start, stop))


def rewrite_change(table: Table, lake: Lake, rows: pa.Table, *, remove: Sequence[DataFile] = (), **more: Any) -> Change:
    """A rewrite of billing.things planned on the table as loaded: add `rows`, remove files, alone in the partitions added to."""
    files = stage(table, lake.declaration(THINGS), rows)
    base = table.current_snapshot()
    planned: dict[str, Any] = {"expected": {}, "reached": {}, "scope": scope_of([*files, *remove])}
    return Change(THINGS, add=files, remove=remove, rewrite=True, base=base.snapshot_id if base else None, **(planned | more))


def rewrite(lake: Lake, rows: pa.Table, remove: Sequence[DataFile] = (), **more: Any) -> Committed:
    """Rewrite billing.things at its present state."""
    table = lake.open_for_write(THINGS)
    return commit(table, lake.run, rewrite_change(table, lake, rows, remove=remove, **more))


def live_files(table: Table) -> list[DataFile]:
    """The data files of the current snapshot."""
    return [task.file for task in table.scan().plan_files()]


def offsets(lake: Lake, partition: int = 0) -> list[int]:
    """The offsets that raw.records holds of a partition, sorted; repeats show."""
    rows = lake.load(RAW).scan(selected_fields=("partition", "offset")).to_arrow().to_pylist()
    return sorted(r["offset"] for r in rows if r["partition"] == partition)


def position(lake: Lake, partition: int = 0) -> int:
    """Where raw.records stands in a partition."""
    return vector_of(lake.load(RAW).metadata, RAW).get((TOPIC, partition), 0)


def stored(lake: Lake, suffix: str = ".parquet") -> set[str]:
    """The files under the warehouse with this suffix, by their Iceberg paths."""
    root = lake.settings.iceberg_warehouse
    scheme, _, place = root.partition("://")
    io = load_file_io(lake.catalog.properties, root)
    assert isinstance(io, PyArrowFileIO)
    found = io.fs_by_scheme(scheme, place.split("/")[0]).get_file_info(FileSelector(place, recursive=True, allow_not_found=True))
    return {f"{scheme}://{f.path}" for f in found if f.path.endswith(suffix)}


def settings_of(environment: Mapping[str, str], **more: Any) -> Settings:
    """The settings that a process with these LAKEHOUSE_* variables has."""
    return Settings(**{name.removeprefix(PREFIX).lower(): value for name, value in environment.items()}, **more)


Fault = Callable[[Callable[[], Any]], Any]
"""Given `send` (the real commit, ready to go), do something else as well, or instead."""


class Wire:
    """Between the commit path and the real catalog: each fault in the queue meets one commit, the others pass."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.sent = 0
        self.down = False
        self.refused_while_down = 0

    def carry(self, send: Callable[[], Any]) -> Any:
        """One commit on its way."""
        self.sent += 1
        return self.faults.pop(0)(send) if self.faults else send()


class CallWire(Wire):
    """In front of a catalog without a network: its `commit_table` and, while it is down, `load_table`."""

    def __init__(self, catalog: Catalog, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        commit, load = catalog.commit_table, catalog.load_table
        patch.setattr(catalog, "commit_table", lambda *args: self.carry(lambda: commit(*args)))
        patch.setattr(catalog, "load_table", lambda identifier: self._unless_down(lambda: load(identifier)))

    def _unless_down(self, act: Callable[[], Any]) -> Any:
        if self.down:
            self.refused_while_down += 1
            raise ConnectionError("no route to host")
        return act()


REFUSALS = {
    "rest": Answer(409, b'{"error": {"message": "made up", "type": "CommitFailedException", "code": 409}}'),
    "glue": Answer(
        400,
        b'{"__type": "ConcurrentModificationException", "message": "made up"}',
        (("Content-Type", "application/x-amz-json-1.1"), ("x-amzn-errortype", "ConcurrentModificationException")),
    ),
}


class HttpWire(Wire):
    """A proxy in front of a catalog: a fault that raises costs the client its answer, and CommitFailedException is a refusal."""

    def __init__(self, proxy: FaultProxy, kind: str) -> None:
        super().__init__()
        self.proxy, self._kind = proxy, kind
        proxy.rule = self._rule

    def _rule(self, request: Request, send: Callable[[], Answer]) -> Answer:
        if self.down:
            self.refused_while_down += 1
            raise ConnectionError("no route to host")
        if not self.is_commit(request):
            return send()
        refused: list[Answer] = []

        def send_or_raise() -> Answer:
            answer = send()
            if answer.status == 409 or b"ConcurrentModificationException" in answer.body:
                refused.append(answer)
                raise CommitFailedException("refused")
            return answer

        try:
            answer: Answer = self.carry(send_or_raise)
        except CommitFailedException:
            return refused[-1] if refused else REFUSALS[self._kind]
        return answer

    def is_commit(self, request: Request) -> bool:
        """Whether the request is the one that publishes."""
        if self._kind == "glue":
            return request.headers.get("x-amz-target", "").endswith("UpdateTable")
        return request.method == "POST" and re.search(r"/tables/[^/]+$", request.path) is not None


def lost_before(_send: Callable[[], Any]) -> Any:
    """The request never arrives."""
    raise ConnectionError("connection refused")


def lost_after(send: Callable[[], Any]) -> Any:
    """The request is carried out, its answer is lost."""
    send()
    raise TimeoutError("no answer")


def first(act: Callable[[], Any]) -> Fault:
    """Somebody else acts between our check and the catalog's compare-and-swap."""

    def fault(send: Callable[[], Any]) -> Any:
        act()
        return send()

    return fault


def lost_after_then(act: Callable[[], Any]) -> Fault:
    """The request is carried out, its answer is lost, and somebody else acts before we can look."""

    def fault(send: Callable[[], Any]) -> Any:
        send()
        act()
        raise TimeoutError("no answer")

    return fault
