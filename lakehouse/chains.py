"""The order of versions that carry the same second: the chain through their previous values.

Stripe's `created` has one-second resolution, and Stripe says not to order by it alone. An update names the values it
replaced (`data.previous_attributes`), so within one object and second B follows A when B's previous values are A's
values. The chain hangs on the state before that second, which also breaks cycles (active -> past_due -> active).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import polars as pl

State = Mapping[str, Any]

MAX_SEARCHED = 8
"""Groups up to this size are searched for a whole chain; larger ones are linked greedily."""


class Version(msgspec.Struct, frozen=True):
    """One state of an object: its values, the values it replaced (None: not said), and how to break ties."""

    state: State
    previous: State | None
    rank: int
    event_id: str


def follows(version: Version, before: State | None) -> bool:
    """Whether `version` replaced the state `before`: each previous value it names is the value there; NULL equals absent."""
    if version.previous is None or before is None:
        return False
    return all(before.get(name) == value for name, value in version.previous.items())


def order_group(versions: Sequence[Version], anchor: State | None) -> list[int]:
    """Indices of `versions` (of one object and second) in order of events.

    anchor: the state before that second, None if unknown. The result does not depend on the order of the input: ties
    are broken by (rank, event id).
    """
    start = sorted(range(len(versions)), key=lambda i: (versions[i].rank, versions[i].event_id))
    if len(start) == 1:
        return start
    if len(start) <= MAX_SEARCHED:
        best: list[int] = []
        best_links = -1

        def search(done: list[int], left: list[int], state: State | None, links: int) -> None:
            nonlocal best, best_links
            if links + len(left) <= best_links:
                return
            if not left:
                best, best_links = done, links
                return
            # linked candidates first, each class in tie-break order: the first full chain found is the smallest one
            for i in sorted(left, key=lambda i: not follows(versions[i], state)):
                linked = follows(versions[i], state) or (state is None and versions[i].previous is None)
                search([*done, i], [j for j in left if j != i], versions[i].state, links + linked)

        search([], start, anchor, 0)
        return best
    ordered, state = [], anchor
    while start:
        i = next((i for i in start if follows(versions[i], state)), start[0])
        start.remove(i)
        ordered.append(i)
        state = versions[i].state
    return ordered


def sequence_in_second(versions: pl.DataFrame, *, keys: Sequence[str], time: str) -> pl.DataFrame:
    """Add `sequence`: the place of each version among those of its object and second, 0 upward.

    versions: columns keys, time, `state` and `previous` (JSON text; previous NULL: not said), `rank` (int), `event_id`.
    Only objects that have a second with several versions are looked at one by one; the rest is 0 at once.
    """
    crowded = versions.group_by([*keys, time]).len().filter(pl.col("len") > 1)
    if crowded.is_empty():
        return versions.with_columns(pl.lit(0, pl.Int32).alias("sequence"))
    plain = versions.join(crowded, on=list(keys), how="anti").with_columns(pl.lit(0, pl.Int32).alias("sequence"))
    parts = [plain]
    decode = msgspec.json.decode
    for _, of_object in versions.join(crowded, on=list(keys), how="semi").group_by(list(keys)):
        anchor: State | None = None
        for _, group in of_object.sort(time).group_by([time], maintain_order=True):
            found = [
                Version(decode(s), None if p is None else decode(p), r, e)
                for s, p, r, e in group.select("state", "previous", "rank", "event_id").iter_rows()
            ]
            ordered = order_group(found, anchor)
            place = [0] * len(ordered)
            for at, index in enumerate(ordered):
                place[index] = at
            parts.append(group.with_columns(pl.Series("sequence", place, pl.Int32)))
            anchor = found[ordered[-1]].state
    return pl.concat(parts)
