"""Drift: where what we hold differs from what another source says, one row a field, open until the two agree.

A comparison is a pure function of two frames. What it finds is written down together with the position that the comparison
has reached, in one commit: an interrupted run goes on behind it, and a difference is neither lost nor doubled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import polars as pl
from pyiceberg.expressions import BooleanExpression, IsNull
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from lakehouse.commit import Change, commit, scope_of
from lakehouse.errors import Replan
from lakehouse.lake import Lake
from lakehouse.live import files_where
from lakehouse.positions import Vector, vector_of
from lakehouse.predicates import all_of, equal
from lakehouse.queries import connect, fetch, files_sql
from lakehouse.staging import stage

TABLE = "ops.reconciliation_drift"
MAX_PLANS = 20
OPEN: BooleanExpression = IsNull("resolved_at")  # type: ignore[arg-type, call-arg]

OBJECT = ["account", "livemode", "object_type", "object_id"]
WHOLE = "*"
"""The `field` of a row that speaks of a whole object."""

VALUES = {**dict.fromkeys(["account", "object_type", "object_id", "field", "value"], pl.String()), "livemode": pl.Boolean()}
"""Schema of what is compared: one row a field, `value` as JSON text (`null` is a value; an absent row says nothing)."""

FOUND = {
    "account": pl.String(),
    "livemode": pl.Boolean(),
    "object_type": pl.String(),
    "object_id": pl.String(),
    "field": pl.String(),
    "ours": pl.String(),
    "theirs": pl.String(),
    "state": pl.String(),
}


def compare(ours: pl.DataFrame, theirs: pl.DataFrame) -> pl.DataFrame:
    """Every difference between two sides, as columns FOUND. A pure function; both frames have the columns of VALUES.

    - an object that only they have: `missing`, one row with field `*`; one that only we have: `extra`;
    - a field that both carry with other values: `differs`;
    - a field that they carry, not NULL, and we never did: `missing`. What only we carry says nothing: their rendering of an
      object (an older or newer API version, a connector's table) may not have it.
    """
    ours, theirs = ours.select(*OBJECT, "field", "value"), theirs.select(*OBJECT, "field", "value")
    mine, other = ours.select(OBJECT).unique(), theirs.select(OBJECT).unique()
    whole = [
        other.join(mine, on=OBJECT, how="anti").with_columns(state=pl.lit("missing")),
        mine.join(other, on=OBJECT, how="anti").with_columns(state=pl.lit("extra")),
    ]
    nothing = pl.lit(None, pl.String)
    objects = pl.concat(whole).with_columns(field=pl.lit(WHOLE), ours=nothing, theirs=nothing)
    both = theirs.join(mine, on=OBJECT, how="semi").join(ours, on=[*OBJECT, "field"], how="left", suffix="_ours")
    carried = pl.col("value_ours").is_not_null()
    differs = (carried & (pl.col("value") != pl.col("value_ours"))) | (~carried & (pl.col("value") != "null"))
    fields = both.filter(differs).with_columns(
        state=pl.when(carried).then(pl.lit("differs")).otherwise(pl.lit("missing")),
        ours=pl.col("value_ours"),
        theirs=pl.col("value"),
    )
    return pl.concat([f.select(list(FOUND)).cast(FOUND) for f in (objects, fields)]).sort(*OBJECT, "field")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Position:
    """How far a comparison has come: `consumer` at `expected` when it began, and at `reached` now."""

    consumer: str
    expected: Vector
    reached: Vector


NOWHERE = Position(TABLE, {}, {})


@dataclass(frozen=True)
class Recorded:
    """What a commit of drift did: rows that are new, seen again and still open, and resolved."""

    new: int = 0
    again: int = 0
    resolved: int = 0


def positions(lake: Lake, consumer: str) -> dict[tuple[str, int], int]:
    """How far a comparison has come: see `Position`."""
    return vector_of(lake.open_for_write(TABLE).metadata, consumer)


def open_drift(lake: Lake, source: str) -> pl.DataFrame:
    """The rows of one source that are not resolved, with all columns."""
    table = lake.open_for_write(TABLE)
    return pl.DataFrame(table.scan(all_of([equal("source", source), OPEN])).to_arrow())


def record(
    lake: Lake,
    source: str,
    found: pl.DataFrame,
    checked: pl.DataFrame,
    at: datetime,
    position: Position = NOWHERE,
) -> Recorded:
    """Write down what a comparison found of the objects it `checked` (columns OBJECT), and how far it came.

    A difference that is open already is seen again; an open one of a checked object that is not found any more is resolved; a
    new one becomes a row. found: columns FOUND, and if known `theirs_at` and `sent`: what is right went through the raw topic.

    Raises:
        Fenced: another run moved the position. Replan: others changed the same rows again and again.
    """
    for _ in range(MAX_PLANS):
        try:
            return _record_once(lake, source, found, checked, at, position)
        except Replan:  # another comparison wrote meanwhile
            continue
    raise Replan(f"{TABLE}: other comparisons changed the same rows {MAX_PLANS} times; run it again")


def _record_once(
    lake: Lake,
    source: str,
    found: pl.DataFrame,
    checked: pl.DataFrame,
    at: datetime,
    position: Position,
) -> Recorded:
    declared, table = lake.declaration(TABLE), lake.open_for_write(TABLE)
    base = table.current_snapshot()
    files = files_where(table, OPEN)
    held = _rows_of(lake, table, files)
    ours_to_judge = (pl.col("source") == source) & pl.col("resolved_at").is_null()
    before, others = held.filter(ours_to_judge), held.filter(~ours_to_judge | pl.col("source").is_null())
    after, fresh = judged(before, _as_rows(lake, source, found, at, held), checked, at)
    again = after.filter(pl.col("seen_at") == at, pl.col("resolved_at").is_null()).height
    resolved = after.filter(pl.col("resolved_at").is_not_null()).height
    content = pl.concat([others, after, fresh])
    if not (again or resolved):  # no row that is there changes: its file stays
        content, files = fresh, []
    add = stage(table, declared, content.to_arrow())
    change = Change(
        position.consumer,
        position.expected,
        position.reached,
        add=add,
        remove=files,
        rewrite=True,
        base=base.snapshot_id if base else None,
        scope=scope_of([*add, *files]),
    )
    commit(table, lake.run, change)
    return Recorded(fresh.height, again, resolved)


def judged(before: pl.DataFrame, found: pl.DataFrame, checked: pl.DataFrame, at: datetime) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What becomes of the open rows `before` when `found` is what differs now among the objects `checked`; and the new rows.

    A pure function of frames with the columns of the table (checked: OBJECT).
    """
    key = [*OBJECT, "field"]
    moment = pl.lit(at).cast(pl.Datetime("us", "UTC"))
    now = found.select(*key, "ours", "theirs", "theirs_at", "repaired_at", __found=pl.lit(value=True))
    looked_at = checked.select(OBJECT).unique().with_columns(__checked=pl.lit(value=True))
    joined = before.join(now, on=key, how="left", suffix="_now").join(looked_at, on=OBJECT, how="left")
    still, gone = pl.col("__found").is_not_null(), pl.col("__found").is_null() & pl.col("__checked").is_not_null()
    after = joined.with_columns(
        *(pl.when(still).then(pl.col(f"{c}_now")).otherwise(pl.col(c)).alias(c) for c in ("ours", "theirs", "theirs_at")),
        pl.coalesce("repaired_at", "repaired_at_now").alias("repaired_at"),
        pl.when(still | gone).then(moment).otherwise(pl.col("seen_at")).alias("seen_at"),
        pl.when(gone).then(moment).otherwise(pl.col("resolved_at")).alias("resolved_at"),
    )
    return after.select(before.columns), found.join(before, on=key, how="anti").select(before.columns)


def _as_rows(lake: Lake, source: str, found: pl.DataFrame, at: datetime, held: pl.DataFrame) -> pl.DataFrame:
    """What was found, with the columns of the table (of `held`)."""
    moment, nothing = (pl.lit(v).cast(pl.Datetime("us", "UTC")) for v in (at, None))
    rows = found.unique([*OBJECT, "field"], keep="first", maintain_order=True)
    return (
        rows.with_columns(
            source=pl.lit(source),
            theirs_at=pl.col("theirs_at") if "theirs_at" in rows.columns else nothing,
            found_at=moment,
            seen_at=moment,
            run_id=pl.lit(lake.run.run_id),
            repaired_at=pl.when("sent").then(moment) if "sent" in rows.columns else nothing,
            resolved_at=nothing,
        )
        .select(held.columns)
        .cast(dict(held.schema))  # type: ignore[arg-type]
    )


def _rows_of(lake: Lake, table: Table, files: Sequence[DataFile]) -> pl.DataFrame:
    """All rows of some files of the table; of none, a frame with its columns."""
    columns = lake.declaration(TABLE).column_names
    empty = pl.DataFrame(schema_to_pyarrow(table.schema(), include_field_ids=False).empty_table()).select(columns)
    if not files:
        return empty
    with connect(lake.settings) as connection:
        chosen = ", ".join(f'"{c}"' for c in columns)
        rows = fetch(connection, f"SELECT {chosen} FROM {files_sql(table, files)}")
    return pl.DataFrame(rows).cast(dict(empty.schema))  # type: ignore[arg-type]
