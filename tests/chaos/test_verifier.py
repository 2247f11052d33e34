"""The verifier itself: it finds nothing wrong with a right table, and says what is wrong with each kind of wrong one.

The tables are made with pyiceberg alone, by hand, as no writer of ours would.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.table import Table

from tests.chaos.verifier import LOG_SCHEMA, Verdict, verify

Row = dict[str, Any]


def row(offset: int, partition: int = 0, topic: str = "t", **other: Any) -> Row:
    plain = {
        "key": b"k%d" % offset,
        "headers": [{"key": "a", "value": b"1"}, {"key": "a", "value": None}],
        "payload": b"v%d" % offset,
    }
    return {"topic": topic, "partition": partition, "offset": offset} | plain | other


ODD = [row(3, key=None, headers=[], payload=None), row(4, key=b"", payload=b""), row(5, payload=bytes(range(256)) * 99)]
LOG = [*(row(i) for i in range(3)), *ODD, *(row(i, partition=1) for i in range(4))]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    catalog = SqlCatalog("c", uri=f"sqlite:///{tmp_path}/c.db", warehouse=f"file://{tmp_path}/warehouse")
    catalog.create_namespace("raw")
    return catalog.create_table("raw.t", LOG_SCHEMA)


def arrow(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, LOG_SCHEMA)


def judged(table: Table, *batches: list[Row], log: list[Row] = LOG) -> Verdict:
    for batch in batches:
        table.append(arrow(batch))
    return verify(arrow(log), table.metadata_location)


def test_a_right_table_is_clean_however_it_was_written(table: Table) -> None:
    verdict = judged(table, LOG[6:], LOG[:2], LOG[2:6])
    assert verdict.clean
    assert (verdict.rows, verdict.files) == (10, 3)
    table.overwrite(arrow(LOG))  # as compaction does: the old files are listed as deleted
    verdict = judged(table)
    assert verdict.clean
    assert (verdict.rows, verdict.files) == (10, 1)


def test_an_empty_table_has_lost_everything(table: Table) -> None:
    assert len(judged(table).lost) == 10
    assert judged(table, log=[]).clean


def test_a_gap_is_caught(table: Table) -> None:
    verdict = judged(table, LOG[:1], LOG[2:])
    assert (verdict.lost, verdict.doubled, verdict.changed, verdict.clean) == ([("t", 0, 1)], [], [], False)
    assert verdict.summary()["lost"] == 1


def test_a_duplicate_is_caught_in_the_same_file_and_in_another(table: Table) -> None:
    verdict = judged(table, [*LOG, LOG[0]], [LOG[7]])
    assert (verdict.doubled, verdict.clean) == ([("t", 0, 0), ("t", 1, 1)], False)


def test_a_file_that_is_listed_twice_is_caught(table: Table) -> None:
    """A commit that landed and was sent again: the same file in two snapshots."""
    table.append(arrow(LOG))
    (path,) = [task.file.file_path for task in table.scan().plan_files()]
    table.add_files([path], check_duplicate_files=False)
    assert len(judged(table).doubled) == 10


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"payload": b"v1\x00"}, "payload"),
        ({"payload": b"V1"}, "payload"),
        ({"payload": None}, "payload"),
        ({"key": b"k2"}, "key"),
        ({"key": None}, "key"),
        ({"headers": [{"key": "a", "value": None}, {"key": "a", "value": b"1"}]}, "headers"),
        ({"headers": [{"key": "a", "value": b"1"}]}, "headers"),
        ({"headers": [{"key": "a", "value": b"1"}, {"key": "a", "value": b""}]}, "headers"),
    ],
)
def test_a_changed_byte_is_caught(table: Table, change: Row, name: str) -> None:
    verdict = judged(table, [LOG[0], LOG[1] | change, *LOG[2:]])
    assert (verdict.changed, verdict.lost, verdict.doubled, verdict.clean) == ([(("t", 0, 1), name)], [], [], False)


@pytest.mark.parametrize(
    ("odd", "change"), [(0, {"payload": b""}), (0, {"key": b""}), (1, {"payload": None}), (1, {"key": None})]
)
def test_empty_is_not_null(table: Table, odd: int, change: Row) -> None:
    rows = [r | change if r is ODD[odd] else r for r in LOG]
    assert [at for at, _ in judged(table, rows).changed] == [("t", 0, 3 + odd)]


def test_a_duplicate_with_another_payload_is_both(table: Table) -> None:
    verdict = judged(table, LOG, [LOG[2] | {"payload": b"other"}])
    assert (verdict.doubled, verdict.changed) == ([("t", 0, 2)], [(("t", 0, 2), "payload")])


def test_a_row_that_was_never_produced_is_caught(table: Table) -> None:
    verdict = judged(table, LOG, [row(99, topic="another")])
    assert (verdict.unexpected, verdict.clean) == ([("another", 0, 99)], False)


def test_only_the_current_snapshot_counts(table: Table) -> None:
    """Neither what was rolled back nor what lies on a branch."""
    table.append(arrow(LOG))
    target = table.current_snapshot()
    assert target is not None
    table.append(arrow(LOG))
    table.manage_snapshots().create_branch(target.snapshot_id, "audit").commit()
    table.append(arrow([row(50)]), branch="audit")
    table.manage_snapshots().set_current_snapshot(target.snapshot_id).commit()
    assert judged(table).clean


def test_a_deleted_file_does_not_count(table: Table) -> None:
    """Though its manifest still lists it, and it is still there."""
    table.append(arrow(LOG))
    table.append(arrow([row(0, topic="gone")]))
    table.delete("topic = 'gone'")
    verdict = judged(table)
    assert verdict.clean
    assert verdict.files == 1


def test_a_file_with_other_rows_than_its_manifest_says_is_caught(table: Table) -> None:
    table.append(arrow(LOG))
    (path,) = [task.file.file_path for task in table.scan().plan_files()]
    local = path.removeprefix("file://")
    pq.write_table(pq.read_table(local).slice(1), local)
    verdict = judged(table)
    assert len(verdict.broken) == len(verdict.lost) == 1


def test_a_file_that_is_gone_is_no_verdict(table: Table) -> None:
    table.append(arrow(LOG))
    (path,) = [task.file.file_path for task in table.scan().plan_files()]
    Path(path.removeprefix("file://")).unlink()
    with pytest.raises(FileNotFoundError):
        judged(table)


def test_delete_files_are_refused(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    table.append(arrow(LOG))
    read: Callable[..., list[Row]] = __import__("tests.chaos.verifier", fromlist=["_avro"])._avro
    monkeypatch.setattr(
        "tests.chaos.verifier._avro", lambda *a: [r | {"content": 1} if "manifest_path" in r else r for r in read(*a)]
    )
    with pytest.raises(ValueError, match="delete files"):
        judged(table)


def test_it_shares_no_code_with_what_it_judges() -> None:
    """Its own words say so: let its imports say so too."""
    import ast

    tree = ast.parse(Path(__file__).with_name("verifier.py").read_text("utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & {"lakehouse", "writers", "pyiceberg", "tests", "polars"}
