"""The versions of one kind of Stripe object, in order and typed: what every billing table starts from."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from lakehouse.chains import sequence_in_second
from lakehouse.transforms import Inputs

KEYS = ["account", "object_id"]


def ordered_versions(inputs: Inputs, object_type: str, columns: Mapping[str, str]) -> pl.DataFrame:
    """All live-mode versions of one object type in `billing.event_versions`, ordered within each object.

    columns: {name in `state`: DuckDB type}. A value that a version's shape does not carry is the last one carried.

    Returns:
        Columns account, object_id, created_at, sequence, deleted, recorded_at and those asked for; sorted by account,
        object_id, created_at, sequence.
    """
    carried = ", ".join(f"json_extract(state, '$.{name}') AS \"{name}\"" for name in columns)
    found = inputs.sql(
        "SELECT account, object_id, event_id, created_at, rank, deleted, state, previous, recorded_at, "
        f"{carried} FROM billing.event_versions WHERE object_type = $object_type AND livemode",
        object_type=object_type,
    )
    in_order = sequence_in_second(pl.DataFrame(found), keys=KEYS, time="created_at").sort(*KEYS, "created_at", "sequence")
    filled = in_order.drop("state", "previous").with_columns(pl.col(list(columns)).forward_fill().over(KEYS))
    inputs.connection.register("__filled", filled.to_arrow())
    # JSON null is a value that is NULL; SQL NULL is one that no version has carried yet
    typed = ", ".join(f'TRY_CAST("{name}" ->> \'$\' AS {kind}) AS "{name}"' for name, kind in columns.items())
    rows = inputs.connection.execute(
        f"SELECT account, object_id, created_at, sequence, deleted, recorded_at, {typed} "
        "FROM __filled ORDER BY account, object_id, created_at, sequence"
    ).to_arrow_table()
    return pl.DataFrame(rows)
