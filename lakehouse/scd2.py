"""SCD2: versions of a key become half-open intervals `[valid_from, valid_to)` of equal tracked values.

Pure functions over any frame, independent of Stripe: `scd2` for all versions, `scd2_update` for the few intervals that new
versions touch. The semantics are those of Spark's open-sourced AUTO CDC; docs/scd2.md shows them by example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import polars as pl
import pyarrow as pa

from lakehouse.errors import Terminal, UsageError

FROM, TO = "valid_from", "valid_to"


class Roles(TypedDict):
    """The arguments of `scd2` that say which column is what, kept beside a table's code."""

    keys: Sequence[str]
    time: str
    tracked: Sequence[str]
    sequence: NotRequired[Sequence[str]]
    untracked: NotRequired[Sequence[str]]
    deleted: NotRequired[str]


@dataclass(frozen=True)
class Changed:
    """What becomes of a history: the intervals to take out of it, and those to put in. Both sorted by keys and valid_from."""

    remove: pl.DataFrame
    add: pl.DataFrame


def scd2(
    versions: pl.DataFrame | pa.Table,
    *,
    keys: Sequence[str],
    time: str,
    sequence: Sequence[str] = (),
    tracked: Sequence[str],
    untracked: Sequence[str] = (),
    deleted: str | None = None,
) -> pl.DataFrame:
    """The history of each key, whatever the order of the rows and however often one is repeated.

    Args:
        versions: one row a known state; columns `keys`, `time`, `sequence`, `tracked`, `untracked`, `deleted`; others stay out.
        keys: identify the thing.
        time: when the state began; of any type that sorts, its values become valid_from and valid_to.
        sequence: order among the states of one time, ascending: the first column decides, then the second, ...
        tracked: a change in one of them starts a new interval; NULL equals NULL.
        untracked: never start an interval; an interval has the value of its last version.
        deleted: boolean column; true closes the key, NULL counts as false.

    Returns:
        Columns keys, tracked, untracked, valid_from, valid_to (NULL: open), sorted by keys and valid_from.

        - No interval is empty: of several states of one time the last by `sequence` counts.
        - Equal neighbours are one interval. The version between them is not lost: a late row before it splits there again.
        - A delete closes; the key is in a gap until it comes back. A delete of a key that has no state yet makes no interval,
          and still ends what a late row puts before it. Of a delete and an upsert with one sequence the delete counts.
        - The same key, time and sequence twice is one event; if the contents differ, which counts does not depend on the order
          of the rows.

    Raises:
        Terminal: a NULL in a key, in `time` or in a sequence column; nothing is returned.
        UsageError: a column is missing, named in two roles, or called valid_from or valid_to; `deleted` is not boolean.
    """
    frame = _checked("scd2", versions, keys, time, sequence, tracked, untracked, deleted)
    states = _states(frame, keys, time, sequence, tracked, untracked, deleted)
    same_key = pl.all_horizontal([pl.col(k).eq_missing(pl.col(k).shift()) for k in keys])
    unchanged = [pl.col(c).eq_missing(pl.col(c).shift()) for c in tracked]
    same_state = (
        pl.when(pl.col("__gone") | pl.col("__gone").shift())
        .then(pl.col("__gone") & pl.col("__gone").shift())
        .otherwise(pl.all_horizontal(unchanged) if unchanged else pl.lit(value=True))
    )
    grouped = states.with_columns((~(same_key & same_state)).fill_null(value=True).cum_sum().alias("__group"))
    intervals = (
        grouped.group_by("__group", maintain_order=True)
        .agg(
            *[pl.col(c).first() for c in (*keys, *tracked)],
            *[pl.col(c).last() for c in untracked],
            pl.col("__gone").first(),
            pl.col(time).first().alias(FROM),
        )
        .with_columns(pl.col(FROM).shift(-1).over(list(keys)).alias(TO))
    )
    return intervals.filter(~pl.col("__gone")).select(*keys, *tracked, *untracked, FROM, TO)


def scd2_update(
    history: pl.DataFrame | pa.Table,
    known: pl.DataFrame | pa.Table,
    new: pl.DataFrame | pa.Table,
    *,
    keys: Sequence[str],
    time: str,
    sequence: Sequence[str] = (),
    tracked: Sequence[str],
    untracked: Sequence[str] = (),
    deleted: str | None = None,
) -> Changed:
    """What `new` versions change in a history made by `scd2`: only intervals of their keys, and of these only what differs.

    Taking `remove` out of the history and putting `add` in gives what `scd2` makes of all versions together. Nothing has to be
    read but what lies near the new versions. Let *anchor* be the last known version of a key before (by `time`) its first new
    one. Then, for each key of `new`:

    Args:
        history: its intervals that end after the anchor (or are open); all of them if there is no anchor. More does no harm.
        known: its versions from the anchor on (with all of the anchor's own time); all before it may be there or not.
        new: versions to be taken up; one that is known already changes nothing.
        keys, time, sequence, tracked, untracked, deleted: as for `scd2`.

    Raises:
        Terminal, UsageError: as `scd2`; nothing is changed.
    """
    roles = (keys, time, sequence, tracked, untracked, deleted)
    fresh = _checked("scd2_update: new", new, *roles)
    before = _checked("scd2_update: known", known, *roles)
    columns = [*keys, *tracked, *untracked, FROM, TO]
    present = _frame(history)
    if missing := [c for c in columns if c not in present.columns]:
        raise UsageError(f"scd2_update: the history has no column {missing[0]!r}")
    first = fresh.group_by(list(keys)).agg(pl.col(time).min().alias("__first"))
    concerned = before.join(first, on=list(keys), nulls_equal=True)
    anchors = concerned.filter(pl.col(time) < pl.col("__first")).group_by(list(keys)).agg(pl.col(time).max().alias("__anchor"))
    near = concerned.join(anchors, on=list(keys), how="left").filter(
        pl.col("__anchor").is_null() | (pl.col(time) >= pl.col("__anchor"))
    )
    names = [*keys, time, *sequence, *tracked, *untracked, *([deleted] if deleted else [])]
    states = pl.concat([near.select(names), fresh.select(names)], how="vertical_relaxed")
    rebuilt = scd2(states, keys=keys, time=time, sequence=sequence, tracked=tracked, untracked=untracked, deleted=deleted).join(
        anchors, on=list(keys), how="left", maintain_order="left"
    )
    old = present.join(first.select(keys), on=list(keys), how="semi").join(anchors, on=list(keys), how="left")
    old = old.filter(pl.col("__anchor").is_null() | pl.col(TO).is_null() | (pl.col(TO) > pl.col("__anchor")))
    # the interval in force at the anchor began with an earlier version, which does not have to be known here
    began = old.filter(pl.col(FROM) <= pl.col("__anchor")).select(*keys, pl.col(FROM).alias("__began"))
    rebuilt = rebuilt.join(began, on=list(keys), how="left", maintain_order="left").with_columns(
        pl.when(pl.col(FROM) == pl.col("__anchor")).then(pl.coalesce("__began", FROM)).otherwise(FROM).alias(FROM)
    )
    old, rebuilt = old.select(columns), rebuilt.select(columns)
    return Changed(
        old.join(rebuilt, on=columns, how="anti", nulls_equal=True).sort([*keys, FROM]),
        rebuilt.join(old, on=columns, how="anti", nulls_equal=True).sort([*keys, FROM]),
    )


def _frame(rows: pl.DataFrame | pa.Table) -> pl.DataFrame:
    return rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(rows)


def _checked(
    what: str,
    rows: pl.DataFrame | pa.Table,
    keys: Sequence[str],
    time: str,
    sequence: Sequence[str],
    tracked: Sequence[str],
    untracked: Sequence[str],
    deleted: str | None,
) -> pl.DataFrame:
    """The rows as a frame; refuse what `scd2` says that it refuses."""
    frame = _frame(rows)
    for role, value in {"keys": keys, "sequence": sequence, "tracked": tracked, "untracked": untracked}.items():
        if isinstance(value, str):
            raise UsageError(f"{what}: {role} is a list of columns; write [{value!r}]")
    if not keys:
        raise UsageError(f"{what}: keys is empty; without a key there is nothing to have a history")
    named = [*keys, time, *sequence, *tracked, *untracked, *([deleted] if deleted else [])]
    if missing := [c for c in named if c not in frame.columns]:
        raise UsageError(f"{what}: no column {missing[0]!r}; there are {', '.join(frame.columns)}")
    if doubled := sorted({c for c in named if named.count(c) > 1}):
        raise UsageError(f"{what}: column {doubled[0]!r} is named in two roles")
    if taken := [c for c in (*keys, *tracked, *untracked) if c in (FROM, TO)]:
        raise UsageError(f"{what}: a column is called {taken[0]!r}, as the result's own")
    if deleted and frame.schema[deleted] not in (pl.Boolean, pl.Null):
        raise UsageError(f"{what}: deleted column {deleted!r} is {frame.schema[deleted]}, not boolean")
    for column in (*keys, time, *sequence):
        if nulls := frame[column].null_count():
            raise Terminal(f"{what}: {nulls} rows have no {column!r}; keys, time and sequence must not be NULL")
    return frame


def _states(
    frame: pl.DataFrame,
    keys: Sequence[str],
    time: str,
    sequence: Sequence[str],
    tracked: Sequence[str],
    untracked: Sequence[str],
    deleted: str | None,
) -> pl.DataFrame:
    """The state that each time of each key ends with, sorted, with `__gone`: the key is deleted then."""
    gone = pl.col(deleted).fill_null(value=False).cast(pl.Boolean) if deleted else pl.lit(value=False)
    # the same key and sequence with other values: any rule will do, as long as it is not the order of the rows
    content = [c for c in (*tracked, *untracked) if not frame.schema[c].is_nested()]
    nested = [pl.col(c).hash(0).alias(f"__hash_{c}") for c in (*tracked, *untracked) if frame.schema[c].is_nested()]
    order = [*keys, time, *sequence, "__gone", *content, *(e.meta.output_name() for e in nested)]
    return (
        frame.with_columns(gone.alias("__gone"), *nested)
        .sort(order)
        .unique(subset=[*keys, time], keep="last", maintain_order=True)
        .select(*keys, time, *tracked, *untracked, "__gone")
    )
