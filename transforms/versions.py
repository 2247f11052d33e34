"""The versions of one kind of Stripe object, in order and typed, or the last of each: what billing tables start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from lakehouse.chains import sequence_in_second
from lakehouse.plans import frame
from lakehouse.queries import quote, text
from lakehouse.transforms import Inputs
from transforms.life_cycles import progress_of
from transforms.stripe_shapes import shapes, typed_sql

KEYS = ["account", "object_id"]


def ordered_versions(
    inputs: Inputs, object_type: str, columns: Sequence[str] | None = None, lists: Sequence[str] = ()
) -> pl.DataFrame:
    """All live-mode versions of one object type in `billing.event_versions`, ordered within each object.

    columns: of those that catalog/reference/stripe_objects.yaml has for the type (default: all), typed as it says. lists: of
    the nested ones, as JSON text. A value that a version's shape does not carry is the last one carried.

    Returns:
        Columns account, object_id, created_at (of the event), sequence, deleted, recorded_at and those asked for; sorted by
        account, object_id, created_at, sequence.
    """
    kinds = _kinds(inputs, object_type, columns, lists)
    told = "account, object_id, object_type, event_id, event_type, created_at, rank, deleted, state, previous, recorded_at"
    found = _carried(inputs, "billing.event_versions", told, object_type, kinds)
    progress = progress_of(inputs.reference("life_cycles"))
    in_order = sequence_in_second(found, keys=KEYS, time="created_at", progress=progress).sort(*KEYS, "created_at", "sequence")
    # what all versions carry, or none, has nothing to be filled in
    partly = [name for name in kinds if 0 < in_order[name].null_count() < in_order.height]
    return _typed(inputs, in_order.with_columns(pl.col(partly).forward_fill().over(KEYS)), kinds)


def last_versions(
    inputs: Inputs, object_type: str, columns: Sequence[str] | None = None, lists: Sequence[str] = ()
) -> pl.DataFrame:
    """The last of `ordered_versions` of each object: what `billing.object_heads` says, so that no other version is needed."""
    kinds = _kinds(inputs, object_type, columns, lists)
    told = "account, object_id, created_at, 0 AS sequence, deleted, recorded_at"
    return _typed(inputs, _carried(inputs, "billing.object_heads", told, object_type, kinds), kinds)


def _kinds(inputs: Inputs, object_type: str, columns: Sequence[str] | None, lists: Sequence[str]) -> dict[str, str]:
    """{column: its kind} of those asked for."""
    spec = shapes(inputs.reference("stripe_objects"))[object_type]
    chosen = columns if columns is not None else spec["columns"]
    return {name: spec["columns"][name][0] for name in chosen} | dict.fromkeys(lists, "json")


def _carried(inputs: Inputs, table: str, told: str, object_type: str, kinds: Mapping[str, str]) -> pl.DataFrame:
    """The live rows of one object type with each value as JSON: JSON null is a value that is NULL, SQL NULL one not carried."""
    carried = "".join(f', v[{i}] AS "{name}"' for i, name in enumerate(kinds, start=1))
    paths = ", ".join(f"'$.{name}'" for name in kinds)
    return pl.DataFrame(
        inputs.sql(
            f"SELECT {told}{carried} FROM (SELECT *, json_extract(state, [{paths}]) AS v FROM {table} "
            f"WHERE object_type = {text(object_type)} AND livemode)"
        )
    )


def _typed(inputs: Inputs, rows: pl.DataFrame, kinds: Mapping[str, str]) -> pl.DataFrame:
    """The rows with each value as its kind says, in the order of KEYS, created_at, sequence."""
    kept = ["account", "object_id", "created_at", "sequence", "deleted", "recorded_at"]
    inputs.connection.register("__filled", rows.select(*kept, *kinds).to_arrow())
    typed = ", ".join([*kept, *(typed_sql(quote(name), kind, name) for name, kind in kinds.items())])
    return frame(inputs.connection, f"SELECT {typed} FROM __filled").sort(*KEYS, "created_at", "sequence")


def latest(inputs: Inputs, object_type: str, key: str) -> pl.DataFrame:
    """One row an object: its last state in event order. A deletion carries little; the rest is as last carried.

    Returns:
        Columns account, `key` (the object's id), every column of the type, created_at (the object's own; NULL if no version
        said), updated_at (of the last event), deleted.
    """
    columns = [c for c in shapes(inputs.reference("stripe_objects"))[object_type]["columns"] if c != key]
    return (
        last_versions(inputs, object_type, columns)
        .drop("sequence", "recorded_at")
        .rename({"object_id": key, "created_at": "updated_at", "created": "created_at"})
    )


def latest_nested(inputs: Inputs, object_type: str, name: str, *, key: str, parent: str) -> pl.DataFrame:
    """One row for each object of the list `name` in the last state of its parent, with the parent's id as `parent`.

    Returns:
        Columns account, `parent`, every column of the list (`key` among them), updated_at (the parent's).
    """
    last = last_versions(inputs, object_type, [], [name])
    rows = unnested(inputs, last.filter(~pl.col("deleted")), object_type, name)
    renamed = {"object_id": parent, "created_at": "updated_at"} | ({"created": "created_at"} if "created" in rows.columns else {})
    rows = rows.drop("sequence", *([parent] if parent in rows.columns else [])).rename(renamed)
    return rows.filter(pl.col(key).is_not_null()).unique(["account", parent, key], keep="first", maintain_order=True)


def unnested(inputs: Inputs, parents: pl.DataFrame, object_type: str, name: str) -> pl.DataFrame:
    """A row for each object in the list `name` of each of `parents`: account, object_id, created_at, sequence and its columns."""
    columns = shapes(inputs.reference("stripe_objects"))[object_type]["lists"][name]["columns"]
    inputs.connection.register("__parents", parents.to_arrow())
    typed = ", ".join(typed_sql(f"v[{i}]", kind, c) for i, (c, (kind, *_)) in enumerate(columns.items(), start=1))
    paths = ", ".join(f"'$.{c}'" for c in columns)
    return frame(
        inputs.connection,
        f"SELECT account, object_id, created_at, sequence, {typed} FROM ("
        f"SELECT *, json_extract(unnest(json_extract(\"{name}\", '$[*]')), [{paths}]) AS v FROM __parents)",
    )
