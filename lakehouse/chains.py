"""The order of versions that carry the same second: the chain through their previous values.

Stripe's `created` has one-second resolution, and Stripe says not to order by it alone. An update names the values it
replaced (`data.previous_attributes`), so within one object and second B follows A when B's previous values are A's
values. The chain hangs on the state before that second, which also breaks cycles (active -> past_due -> active). Where it
leaves several orders open, the place in the object's life decides, then the event id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, reduce
from typing import Any

import msgspec
import polars as pl

State = Mapping[str, Any]
Progress = Callable[[Mapping[str, Any], State], tuple[int, ...]]
"""How far in its life a version stands, from its row and its state; greater is later."""

MAX_SEARCHED = 8
"""Up to this many versions are searched for the best order; of a larger group those before them are linked one by one."""


class Version(msgspec.Struct, frozen=True):
    """One state of an object: its values, the values it replaced (None: not said), and how to break ties."""

    state: State
    previous: State | None
    rank: int
    event_id: str
    progress: tuple[int, ...] = ()

    @property
    def place(self) -> tuple[int, tuple[int, ...], str]:
        """What decides where the chain says nothing: created first and deleted last, then the life cycle, then the event id."""
        return self.rank, self.progress, self.event_id


def follows(version: Version, before: State | None) -> bool:
    """Whether `version` replaced the state `before`: each previous value it names is the value there; NULL equals absent."""
    if version.previous is None or before is None:
        return False
    return all(before.get(name) == value for name, value in version.previous.items())


def continues(version: Version, before: State | None) -> bool:
    """Whether all that `version` does not name as changed is still as it was in the state `before`.

    One that names no previous values at all (an event that tells of a change told already, an object as fetched) does so where
    its whole state is the state before.
    """
    if before is None or not (version.previous is None or follows(version, before)):
        return False
    unchanged = {*before, *version.state} - (version.previous or {}).keys()
    return all(before.get(name) == version.state.get(name) for name in unchanged)


def order_group(versions: Sequence[Version], anchor: State | None) -> list[int]:
    """Indices of `versions` (of one object and second) in order of events.

    The order with the most links wins; of several, the one where more versions also leave the rest as it was (a version
    that names no change we keep follows anything, and only its whole state says where it belongs).

    anchor: the state before that second, None if unknown. The result does not depend on the order of the input: of orders
    equally good the one that begins with the earlier in life wins (rank, progress, event id), and so on after it.
    """
    left = sorted(range(len(versions)), key=lambda i: versions[i].place)

    @cache
    def gain(before: int | None, i: int) -> int:
        """What it is worth that version `i` comes after version `before` (None: comes first)."""
        state = anchor if before is None else versions[before].state
        links, unchanged = follows(versions[i], state), continues(versions[i], state)
        return (MAX_SEARCHED + 1) * links + unchanged  # no sum of the latter outweighs one link

    @cache
    def best(before: int | None, rest: frozenset[int]) -> int:
        """The most that the versions in `rest` can be worth after version `before`."""
        return max((gain(before, i) + best(i, rest - {i}) for i in rest), default=0)

    ordered: list[int] = []
    before = None
    while left:
        if len(left) <= MAX_SEARCHED:
            rest = frozenset(left)
            candidates = [i for i in left if gain(before, i) + best(i, rest - {i}) == best(before, rest)]
            first = versions[candidates[0]]
            left_open = [i for i in candidates if versions[i].place[:2] == first.place[:2]]
        else:
            left_open = left
        # of equals in life the one that is linked, then the first by event id
        before = max(left_open, key=lambda i: gain(before, i))
        left.remove(before)
        ordered.append(before)
    return ordered


def sequence_in_second(
    versions: pl.DataFrame, *, keys: Sequence[str], time: str, progress: Progress | None = None
) -> pl.DataFrame:
    """Add `sequence`: the place of each version among those of its object and second, 0 upward.

    versions: columns keys, time, `state` and `previous` (JSON text; previous NULL: not said), `rank` (int), `event_id`, and what
    `progress` reads. progress: how far in its life a version stands; it decides, after `rank`, where the chain says nothing.
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
            found = []
            for row in group.iter_rows(named=True):
                state, previous = decode(row["state"]), None if row["previous"] is None else decode(row["previous"])
                place_in_life = progress(row, state) if progress and group.height > 1 else ()
                found.append(Version(state, previous, row["rank"], row["event_id"], place_in_life))
            ordered = order_group(found, anchor)
            place = [0] * len(ordered)
            for at, index in enumerate(ordered):
                place[index] = at
            parts.append(group.with_columns(pl.Series("sequence", place, pl.Int32)))
            # what a shape does not carry is as it was: the anchor is all that the versions so far add up to
            anchor = reduce(lambda before, i: {**before, **found[i].state}, ordered, dict(anchor or {}))
    return pl.concat(parts)
