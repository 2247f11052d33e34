"""Positions: how far a table has consumed each topic partition, kept as properties of the table itself.

A position is written only by the commit that carries the data (or by an empty snapshot), so data and position can never
disagree. Each names the sequence number of the snapshot that set it: if the table's history does not hold it, the table
was rolled back behind our back, and writers must not go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from pyiceberg.table.metadata import TableMetadata

from lakehouse.errors import RolledBack

PROPERTY_PREFIX = "lakehouse.position/"

NUMBERED_HERE = "offsets given out by this table"
"""Source of a topic that no broker numbers: see `Position.source`."""

TopicPartition: TypeAlias = tuple[str, int]
Vector: TypeAlias = Mapping[TopicPartition, int]
"""(topic, partition) -> the next offset to consume. A partition that is absent stands at its beginning, 0."""


@dataclass(frozen=True)
class Position:
    """One entry: the next offset, the snapshot's sequence number that set it, and where the topic came from.

    source: for Kafka, `cluster id/topic id`, so that a re-created topic is noticed; NUMBERED_HERE where the writer numbers
    the rows itself.
    """

    next_offset: int
    sequence_number: int
    source: str = ""


def read_positions(metadata: TableMetadata) -> dict[str, dict[TopicPartition, Position]]:
    """All positions of a table: {consumer: {(topic, partition): Position}}."""
    found: dict[str, dict[TopicPartition, Position]] = {}
    for name, value in metadata.properties.items():
        if name.startswith(PROPERTY_PREFIX):
            consumer, topic, partition = name.removeprefix(PROPERTY_PREFIX).rsplit("/", 2)
            found.setdefault(consumer, {})[topic, int(partition)] = Position(**json.loads(value))
    return found


def vector_of(metadata: TableMetadata, consumer: str) -> dict[TopicPartition, int]:
    """The vector of one consumer: {(topic, partition): next offset}."""
    return {key: p.next_offset for key, p in read_positions(metadata).get(consumer, {}).items()}


def position_properties(consumer: str, reached: Vector, sequence_number: int, sources: Mapping[str, str]) -> dict[str, str]:
    """The table properties that set `consumer` to `reached`; `sources` gives each topic's origin."""
    return {
        f"{PROPERTY_PREFIX}{consumer}/{topic}/{partition}": json.dumps(
            {"next_offset": offset, "sequence_number": sequence_number, "source": sources.get(topic, "")}
        )
        for (topic, partition), offset in reached.items()
    }


def refuse_rolled_back(table: str, metadata: TableMetadata) -> None:
    """Raise RolledBack if a position names a snapshot that `main` no longer goes back to.

    That the current snapshot is older does not say it all: another tool may have committed since the rollback. A position
    older than every snapshot kept is fine: its snapshot has expired.
    """
    kept = _sequence_numbers(metadata)
    for consumer, positions in read_positions(metadata).items():
        for (topic, partition), position in positions.items():
            if position.sequence_number not in kept and position.sequence_number > min(kept, default=0):
                raise RolledBack(
                    f"{table}: rolled back: {consumer} stands at offset {position.next_offset} of {topic}[{partition}], set by "
                    f"sequence number {position.sequence_number}, which the current snapshot ({max(kept, default=0)}) does not "
                    f"go back to. Roll it back together with its positions: lakehouse rollback {table} SNAPSHOT"
                )


def _sequence_numbers(metadata: TableMetadata) -> set[int]:
    """Sequence numbers of the snapshots that `main` consists of, as far back as they are kept."""
    by_id = {s.snapshot_id: s for s in metadata.snapshots}
    found: set[int] = set()
    snapshot = metadata.current_snapshot()
    while snapshot is not None:
        found.add(snapshot.sequence_number or 0)
        snapshot = by_id.get(snapshot.parent_snapshot_id) if snapshot.parent_snapshot_id is not None else None
    return found


def dump_vector(vector: Vector) -> dict[str, int]:
    """A vector as JSON can hold it: {"topic/partition": offset}, sorted."""
    return {f"{topic}/{partition}": offset for (topic, partition), offset in sorted(vector.items())}


def load_vector(dumped: Mapping[str, int]) -> dict[TopicPartition, int]:
    """The inverse of `dump_vector`."""
    return {(key.rsplit("/", 1)[0], int(key.rsplit("/", 1)[1])): offset for key, offset in dumped.items()}
