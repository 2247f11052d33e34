"""Positions set by hand: a commit like any other, whose summary says who did it, why, and what it left out or let come again."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Mapping

from lakehouse.commit import Change, Committed, commit
from lakehouse.errors import UsageError
from lakehouse.lake import Lake
from lakehouse.positions import dump_vector, vector_of
from lakehouse.predicates import all_of, at_least, equal


def stored_from(lake: Lake, name: str, topic: str, partition: int, offset: int) -> int:
    """How many rows of a partition the table holds at `offset` and above; files whose bounds lie below are not read."""
    if not lake.exists(name):
        return 0
    wanted = all_of((equal("topic", topic), equal("partition", partition), at_least("offset", offset)))
    return lake.load(name).scan(wanted, selected_fields=("offset",)).count()


def set_positions(
    lake: Lake, name: str, topic: str, wanted: Mapping[int, int], source: str, why: str, *, again: bool = False
) -> Committed:
    """Let `name` go on with `topic` at `wanted` ({partition: next offset}), as read from `source`.

    again: go back below what is stored all the same: those rows will be there twice.

    Raises:
        UsageError: rows at or above a wanted offset are stored, and `again` was not said. Fenced: a writer committed meanwhile.
    """
    table = lake.open_for_write(name)
    present = vector_of(table.metadata, name)
    for partition, offset in sorted(wanted.items()):
        if offset < present.get((topic, partition), 0) and not again:
            rows = stored_from(lake, name, topic, partition, offset)
            if rows:
                raise UsageError(
                    f"{name}: {rows:,} rows of {topic}[{partition}] from offset {offset} on are stored and would be there twice; "
                    "what is built from the table reads none of them again. If that is what you want, say --again"
                )
    reached = {(topic, partition): offset for partition, offset in wanted.items()}
    expected = {key: present.get(key, 0) for key in reached}
    note = {
        "kind": "positions set",
        "who": f"{getpass.getuser()}@{socket.gethostname()}",
        "why": why,
        "from": str(dump_vector(expected)),
        "to": str(dump_vector(reached)),
    }
    return commit(table, lake.run, Change(name, expected, reached, sources={topic: source}, note=note, by_hand=True))
