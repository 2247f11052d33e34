"""Positions as table properties: what is written is what is read, and a rollback is noticed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyiceberg.schema import Schema
from pyiceberg.table.metadata import TableMetadata, TableMetadataV2
from pyiceberg.table.refs import SnapshotRef, SnapshotRefType
from pyiceberg.table.snapshots import Operation, Snapshot, Summary
from pyiceberg.types import LongType, NestedField

from lakehouse.errors import RolledBack
from lakehouse.positions import (
    PROPERTY_PREFIX,
    Position,
    dump_vector,
    load_vector,
    position_properties,
    read_positions,
    refuse_rolled_back,
    vector_of,
)

# Kafka allows letters, digits, dot, underscore and dash in a topic; a consumer is a table's name
topics = st.from_regex(r"[a-zA-Z0-9._-]{1,12}", fullmatch=True)
vectors = st.dictionaries(st.tuples(topics, st.integers(0, 2**31 - 1)), st.integers(0, 2**63 - 1), max_size=6)
consumers = st.from_regex(r"[a-z]{1,8}\.[a-z_]{1,8}", fullmatch=True)


def metadata(
    properties: dict[str, str], parents: dict[int, int | None] | None = None, current: int | None = None
) -> TableMetadata:
    """Metadata with snapshots {sequence number (and id): its parent's}."""
    parents = parents or {}
    return TableMetadataV2(
        location="file:///nowhere",
        last_column_id=1,
        schemas=[Schema(NestedField(1, "a", LongType(), required=False))],
        partition_specs=[{"spec-id": 0, "fields": []}],  # type: ignore[list-item]
        properties=properties,
        last_sequence_number=max(parents, default=0),
        snapshots=[
            Snapshot(
                snapshot_id=i,
                parent_snapshot_id=parent,
                sequence_number=i,
                timestamp_ms=i,
                manifest_list="file:///nowhere",
                summary=Summary(Operation.APPEND),
            )
            for i, parent in parents.items()
        ],
        current_snapshot_id=current,
        refs={"main": SnapshotRef(snapshot_id=current, snapshot_ref_type=SnapshotRefType.BRANCH)} if current else {},
    )


@given(vectors)
def test_a_vector_survives_json(vector: dict[tuple[str, int], int]) -> None:
    dumped = dump_vector(vector)
    assert load_vector(json.loads(json.dumps(dumped))) == vector
    assert list(dumped) == [f"{t}/{p}" for t, p in sorted(vector)]


@given(st.dictionaries(consumers, vectors, max_size=3), st.integers(0, 2**40), st.text(max_size=10))
def test_positions_survive_as_properties(written: dict[str, dict[tuple[str, int], int]], sequence: int, source: str) -> None:
    properties = {"comment": "not a position", "lakehouse.positions": "neither"}
    for consumer, vector in written.items():
        properties |= position_properties(consumer, vector, sequence, {topic: source for topic, _ in vector})
    found = read_positions(metadata(properties))
    assert found == {
        consumer: {key: Position(offset, sequence, source) for key, offset in vector.items()}
        for consumer, vector in written.items()
        if vector
    }
    for consumer, vector in written.items():
        assert vector_of(metadata(properties), consumer) == vector
    assert vector_of(metadata(properties), "nobody.at_all") == {}


def test_how_they_look() -> None:
    """Other tools read these, and tables in production hold them: the form is not to be changed."""
    assert position_properties("raw.a", {("events", 3): 17}, 5, {"events": "cluster/topic"}) == {
        "lakehouse.position/raw.a/events/3": '{"next_offset": 17, "sequence_number": 5, "source": "cluster/topic"}'
    }
    assert PROPERTY_PREFIX == "lakehouse.position/"


AT_2: dict[str, Any] = {"properties": position_properties("raw.a", {("events", 0): 7}, 2, {})}


@pytest.mark.parametrize(
    ("parents", "current"),
    [
        ({1: None, 2: 1}, 2),
        ({1: None, 2: 1, 3: 2}, 3),
        ({3: None, 4: 3}, 4),  # expired: what was before 3 is not known, and has held until now
        ({1: None, 2: 1, 3: 2, 4: 1}, 3),  # 4 is on a branch
    ],
)
def test_a_table_that_goes_back_to_its_positions_is_fine(parents: dict[int, int | None], current: int) -> None:
    refuse_rolled_back("raw.a", metadata(**AT_2, parents=parents, current=current))


@pytest.mark.parametrize(
    ("parents", "current"),
    [
        ({1: None, 2: 1}, 1),
        ({1: None}, 1),  # and the abandoned one has expired
        ({1: None, 2: 1, 3: 1}, 3),  # another tool has committed since
        ({1: None, 3: 1}, 3),
        ({}, None),
    ],
)
def test_a_table_that_does_not_is_refused(parents: dict[int, int | None], current: int | None) -> None:
    with pytest.raises(RolledBack, match=r"raw\.a: rolled back.*offset 7 of events\[0\].*number 2.*lakehouse rollback raw\.a"):
        refuse_rolled_back("raw.a", metadata(**AT_2, parents=parents, current=current))
