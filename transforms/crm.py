"""What the CRM's rows say together: which of their versions count, and what holds when."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from lakehouse.scd2 import scd2
from lakehouse.transforms import Inputs


def intervals(inputs: Inputs, source: str, row: Sequence[str], values: Sequence[str]) -> pl.DataFrame:
    """The history of each row of a raw CRM table: columns `row`, `values`, valid_from, valid_to.

    A version says what holds from effective_at on. So one written later overrides whatever earlier versions of the same row said
    of that time and after: a version is dropped if a later one took effect at or before it.

    Args:
        row: SQL expressions that tell the CRM's rows apart, each `expression AS name` or a column; values: columns that say
            something. A row that is deleted, or says NULL, holds no more.
    """
    named = [r.rpartition(" AS ")[2] for r in row]
    silent = " OR ".join(["deleted", *(f"{v} IS NULL" for v in values)])
    in_force = f"""
    SELECT {", ".join([*row, *values])}, effective_at, {silent} AS gone
    FROM {source}
    QUALIFY coalesce(
        min(effective_at) OVER (
            PARTITION BY {", ".join(named)} ORDER BY updated_at DESC, "offset" DESC
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) > effective_at,
        true
    )
    """
    return scd2(pl.DataFrame(inputs.sql(in_force)), keys=named, time="effective_at", tracked=values, deleted="gone")
