"""The versions of one kind of Stripe object, in order and typed: what every billing table starts from."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from lakehouse.chains import sequence_in_second
from lakehouse.queries import quote
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
    spec = shapes(inputs.reference("stripe_objects"))[object_type]
    kinds = {name: spec["columns"][name][0] for name in (columns if columns is not None else spec["columns"])}
    kinds |= dict.fromkeys(lists, "json")
    carried = ", ".join(f'v[{i}] AS "{name}"' for i, name in enumerate(kinds, start=1))
    paths = ", ".join(f"'$.{name}'" for name in kinds)
    found = inputs.sql(
        "SELECT account, object_id, object_type, event_id, event_type, created_at, rank, deleted, state, previous, "
        f"recorded_at, {carried} FROM (SELECT *, json_extract(state, [{paths}]) AS v FROM billing.event_versions "
        "WHERE object_type = $object_type AND livemode)",
        object_type=object_type,
    )
    progress = progress_of(inputs.reference("life_cycles"))
    in_order = sequence_in_second(pl.DataFrame(found), keys=KEYS, time="created_at", progress=progress)
    in_order = in_order.sort(*KEYS, "created_at", "sequence")
    filled = in_order.drop("state", "previous").with_columns(pl.col(list(kinds)).forward_fill().over(KEYS))
    inputs.connection.register("__filled", filled.to_arrow())
    # JSON null is a value that is NULL; SQL NULL is one that no version has carried yet
    typed = ", ".join(typed_sql(quote(name), kind, name) for name, kind in kinds.items())
    rows = inputs.connection.execute(
        f"SELECT account, object_id, created_at, sequence, deleted, recorded_at, {typed} "
        "FROM __filled ORDER BY account, object_id, created_at, sequence"
    ).to_arrow_table()
    return pl.DataFrame(rows)


def latest(inputs: Inputs, object_type: str, key: str) -> pl.DataFrame:
    """One row an object: its last state in event order. A deletion carries little; the rest is as last carried.

    Returns:
        Columns account, `key` (the object's id), every column of the type, created_at (the object's own; NULL if no version
        said), updated_at (of the last event), deleted.
    """
    columns = [c for c in shapes(inputs.reference("stripe_objects"))[object_type]["columns"] if c != key]
    versions = ordered_versions(inputs, object_type, columns)
    return (
        versions.group_by(KEYS, maintain_order=True)
        .last()
        .drop("sequence", "recorded_at")
        .rename({"object_id": key, "created_at": "updated_at", "created": "created_at"})
    )


def latest_nested(inputs: Inputs, object_type: str, name: str, *, key: str, parent: str) -> pl.DataFrame:
    """One row for each object of the list `name` in the last state of its parent, with the parent's id as `parent`.

    Returns:
        Columns account, `parent`, every column of the list (`key` among them), updated_at (the parent's).
    """
    last = ordered_versions(inputs, object_type, [], [name]).group_by(KEYS, maintain_order=True).last()
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
    return pl.DataFrame(
        inputs.connection.execute(
            f"SELECT account, object_id, created_at, sequence, {typed} FROM ("
            f"SELECT *, json_extract(unnest(json_extract(\"{name}\", '$[*]')), [{paths}]) AS v FROM __parents)"
        ).to_arrow_table()
    )
