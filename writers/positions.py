"""Where a raw table stands in its topic, beside what Kafka holds: what to look at before setting a position by hand."""

from __future__ import annotations

from dataclasses import dataclass

from confluent_kafka.admin import AdminClient

from lakehouse.errors import UsageError
from lakehouse.lake import Lake
from lakehouse.positions import read_positions
from lakehouse.reposition import set_positions
from lakehouse.services import kafka_config
from writers.topics import describe, watermarks


@dataclass(frozen=True)
class Standing:
    """One partition. next_offset: None if the table has never read it. first, end: of Kafka's log, None if it is not there now.

    lag: records still to be read (the embedded broker says too little). state: `ok`, or what keeps a writer from going on.
    """

    topic: str
    partition: int
    next_offset: int | None
    first: int | None
    end: int | None
    lag: int | None
    state: str
    source: str


def standings(lake: Lake, table: str, topic: str, bootstrap: str) -> list[Standing]:
    """All partitions that the topic has, and all that the table has read of any topic, in order.

    Raises:
        Retryable: no broker answers. Terminal: there is no such topic.
    """
    source, partitions = describe(AdminClient(kafka_config(lake.settings, bootstrap)), bootstrap, topic)
    ends = watermarks(lake.settings, bootstrap, topic, partitions)
    known = read_positions(lake.load(table).metadata).get(table, {}) if lake.exists(table) else {}
    found = []
    for t, p in sorted({*known, *((topic, p) for p in partitions)}):
        position = known.get((t, p))
        first, end = ends.get(p, (None, None)) if t == topic else (None, None)
        stands = position.next_offset if position else None
        lag = None if first is None or end is None else max(0, end - max(first, stands or 0))
        state = _state(stands, position.source if position else source, source if t == topic else None, first)
        found.append(Standing(t, p, stands, first, end, lag, state, position.source if position else source))
    return found


def _state(stands: int | None, known: str, present: str | None, first: int | None) -> str:
    if present is None:
        return "another topic"
    if known and known != present:
        return "created again, or another cluster"
    if first is None:
        return "Kafka has no such partition"
    if stands is not None and stands < first:
        return f"{first - stands:,} records are gone from Kafka"
    return "ok" if stands is not None else "not read yet"


def set_by_hand(
    lake: Lake,
    table: str,
    topic: str,
    bootstrap: str,
    partitions: list[int],
    to: int | str,
    why: str,
    *,
    again: bool = False,
    skip: bool = False,
) -> list[Standing]:
    """Set partitions (none: all) to an offset, or to `earliest`, `latest` or `keep`; returns where they stand then.

    Raises:
        UsageError: no such partition, or records would be doubled or left out without `again` or `skip`. Fenced: a writer
            committed meanwhile.
    """
    source, present = describe(AdminClient(kafka_config(lake.settings, bootstrap)), bootstrap, topic)
    if unknown := sorted(set(partitions) - set(present)):
        raise UsageError(f"topic {topic!r} has no partition {unknown[0]}; it has {min(present)} to {max(present)}")
    ends = watermarks(lake.settings, bootstrap, topic, present)
    known = {s.partition: s for s in standings(lake, table, topic, bootstrap) if s.topic == topic}
    wanted = {}
    for p in partitions or present:
        first, end = ends[p]
        stands = known[p].next_offset
        wanted[p] = {"earliest": first, "latest": end, "keep": stands or 0}.get(str(to), to if isinstance(to, int) else 0)
        unread = max(0, wanted[p] - max(first, stands or 0))
        if unread and not skip:
            raise UsageError(
                f"{topic}[{p}]: Kafka still has {unread:,} records from offset {max(first, stands or 0)} on that would never be "
                "read; if that is what you want, say --skip"
            )
    set_positions(lake, table, topic, wanted, source, why, again=again)
    return [s for s in standings(lake, table, topic, bootstrap) if s.topic == topic and s.partition in wanted]
