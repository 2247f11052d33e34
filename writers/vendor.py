"""The nightly connector's tables compared with ours, field by field, until it can be switched off.

The connector says when it synced each row, so ours is taken as of that moment: a change that came later is not a difference.
Which of its columns say what ours do is data: catalog/reference/vendor_tables.yaml.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from lakehouse.declarations import load_reference
from lakehouse.drift import FOUND, OBJECT, VALUES, compare, record
from lakehouse.errors import UsageError
from lakehouse.lake import Lake
from lakehouse.queries import connect, text
from writers.canonical import PLATFORM, held_fields, held_objects, held_since, one_spelling

SOURCE = "vendor"
SETTLE = timedelta(minutes=15)
"""What changed less than this before a sync may be in it or not: it is not compared."""
ALWAYS = {"id", "livemode", "is_deleted", "_fivetran_deleted", "_fivetran_synced"}

# How a vendor's value becomes the JSON text that the normaliser makes of Stripe's own. `value` is text; NULL stays JSON null.
AS_JSON = {
    "text": "to_json(value)",
    "long": "coalesce(CAST(TRY_CAST(value AS BIGINT) AS VARCHAR), CAST(to_json(value) AS VARCHAR))",
    "bool": "coalesce(lower(CAST(TRY_CAST(value AS BOOLEAN) AS VARCHAR)), CAST(to_json(value) AS VARCHAR))",
    "time": "coalesce(CAST(epoch(TRY_CAST(value AS TIMESTAMPTZ))::BIGINT AS VARCHAR), CAST(to_json(value) AS VARCHAR))",
    "json": "CASE WHEN json_valid(value) THEN value ELSE CAST(to_json(value) AS VARCHAR) END",
}


@dataclass
class VendorTable:
    """One of the connector's tables compared: objects, by what was found; and the fields that differ, with how often."""

    object_type: str
    compared: int = 0
    missing: int = 0
    extra: int = 0
    differing: int = 0
    in_flight: int = 0
    fields: dict[str, int] = field(default_factory=dict)

    @property
    def differences(self) -> int:
        """Objects that differ."""
        return self.missing + self.extra + self.differing


def compare_vendor(
    lake: Lake,
    folder: Path,
    *,
    account: str | None = None,
    dry_run: bool = False,
    say: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, VendorTable]:
    """Compare every table found in `folder` (TABLE.parquet, TABLE.csv, or a folder TABLE of such files) with ours.

    Differences become rows of ops.reconciliation_drift (source `vendor`); those that are gone are resolved. Nothing is repaired:
    which side is right, Stripe says (`lakehouse reconcile`). Only live mode is compared.

    Raises:
        UsageError: no known table is there, or one has no id or no time of sync.
    """
    known: dict[str, dict[str, Any]] = load_reference(lake.settings.catalog_dir, "vendor_tables")
    found = {name: files for name in known if (files := _files(folder, name))}
    if not found:
        raise UsageError(f"{folder} holds none of the tables {', '.join(known)} (as TABLE.parquet, TABLE.csv, or a folder TABLE)")
    done = {}
    for number, (name, files) in enumerate(found.items()):
        say(name, number, len(found))
        done[name] = _compare_table(lake, name, known[name], files, account or PLATFORM, dry_run)
    return done


def _files(folder: Path, name: str) -> list[Path]:
    """The files of one table."""
    single = [p for suffix in ("parquet", "csv") if (p := folder / f"{name}.{suffix}").is_file()]
    return single or sorted(p for p in (folder / name).glob("*") if p.suffix in (".parquet", ".csv"))


def _compare_table(lake: Lake, name: str, spec: Mapping[str, Any], files: list[Path], account: str, dry_run: bool) -> VendorTable:
    kind = spec["object_type"]
    result = VendorTable(kind)
    rows = _read(lake, name, files, spec)
    if rows.is_empty():
        return result
    named = [pl.lit(account).alias("account"), pl.lit(value=True).alias("livemode"), pl.lit(kind).alias("object_type")]
    synced = rows.select(pl.col("id").alias("object_id"), pl.col("synced_at").alias("until"), "deleted").with_columns(named)
    newest: datetime = rows["synced_at"].max()  # type: ignore[assignment]
    since = held_objects(lake, account, True, kind)
    unlisted = [i for i, at in since.items() if at < (newest - SETTLE).timestamp() and i not in set(rows["id"])]
    ours_alone = pl.DataFrame({"object_id": unlisted}, schema={"object_id": pl.String}).with_columns(
        *named, pl.lit(newest).cast(synced.schema["until"]).alias("until"), pl.lit(value=True).alias("deleted")
    )
    objects = pl.concat([synced, ours_alone.select(synced.columns)])
    ours = held_fields(lake, objects)
    theirs = _values(lake, rows.filter(~pl.col("deleted")), spec, named)
    differences = compare(ours, theirs)
    # changed so shortly before the sync that nobody can say whether the sync saw it
    moving = held_since(lake, objects.with_columns((pl.col("until") - SETTLE).alias("since")))
    result.in_flight = differences.select(OBJECT).unique().join(moving, on=OBJECT, how="semi").height
    differences = differences.join(moving, on=OBJECT, how="anti")
    settled = objects.select(OBJECT).join(moving, on=OBJECT, how="anti")
    result.compared = rows.height
    for state, group in (("missing", "missing"), ("extra", "extra")):
        setattr(result, group, differences.filter(pl.col("field") == "*", pl.col("state") == state).height)
    by_field = differences.filter(pl.col("field") != "*")
    result.differing = by_field.select(OBJECT).unique().height
    result.fields = dict(sorted(by_field.group_by("field").len().iter_rows()))
    if not dry_run:
        at = synced.select(*OBJECT, pl.col("until").alias("theirs_at")).unique(OBJECT)
        record(lake, SOURCE, differences.select(list(FOUND)).join(at, on=OBJECT, how="left"), settled, datetime.now(UTC))
    return result


def _read(lake: Lake, name: str, files: list[Path], spec: Mapping[str, Any]) -> pl.DataFrame:
    """One row an object, live mode: id, synced_at, deleted, and the mapped columns as text."""
    with connect(lake.settings) as connection:
        paths = "[" + ", ".join(text(str(p)) for p in files) + "]"
        source = f"read_csv({paths}, all_varchar = true)" if files[0].suffix == ".csv" else f"read_parquet({paths})"
        present = [row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()]
        if lacking := [c for c in ("id", "_fivetran_synced") if c not in present]:
            raise UsageError(f"{files[0]}: the table {name} has no column {lacking[0]!r}; is this the connector's export?")
        kept = [c for c in spec["columns"] if c in present]
        chosen = ", ".join(f'CAST("{c}" AS VARCHAR) AS "{c}"' for c in kept)
        live = 'coalesce(TRY_CAST(CAST("livemode" AS VARCHAR) AS BOOLEAN), true)' if "livemode" in present else "true"
        gone = [
            f'coalesce(TRY_CAST(CAST("{c}" AS VARCHAR) AS BOOLEAN), false)' for c in present if c in ALWAYS and "deleted" in c
        ]
        current = f'AND TRY_CAST(CAST("{spec["current"]}" AS VARCHAR) AS BOOLEAN)' if spec.get("current") in present else ""
        sql = (
            f"SELECT CAST(id AS VARCHAR) AS id, TRY_CAST(CAST(_fivetran_synced AS VARCHAR) AS TIMESTAMPTZ) AS synced_at, "
            f"{' OR '.join(gone) or 'false'} AS deleted{', ' + chosen if chosen else ''} FROM {source} "
            f"WHERE {live} AND id IS NOT NULL {current} "
            "QUALIFY row_number() OVER (PARTITION BY id ORDER BY synced_at DESC) = 1"
        )
        rows = pl.DataFrame(connection.execute(sql).to_arrow_table())
    if rows["synced_at"].null_count():
        raise UsageError(f"{files[0]}: the table {name} has rows whose _fivetran_synced is no time")
    return rows


def _values(lake: Lake, rows: pl.DataFrame, spec: Mapping[str, Any], named: list[pl.Expr]) -> pl.DataFrame:
    """The connector's rows as VALUES, each value as the normaliser would have written it."""
    shape = load_reference(lake.settings.catalog_dir, "stripe_objects")[spec["object_type"]]["columns"]
    parts = [pl.DataFrame(schema=VALUES)]
    with connect(lake.settings) as connection:
        for theirs, ours in spec["columns"].items():
            if theirs not in rows.columns:
                continue
            connection.register("__rows", rows.select("id", pl.col(theirs).alias("value")).to_arrow())
            value = f"CASE WHEN value IS NULL THEN 'null' ELSE {AS_JSON[shape[ours][0]]} END"
            found = pl.DataFrame(
                connection.execute(f"SELECT id AS object_id, CAST({value} AS VARCHAR) AS value FROM __rows").to_arrow_table()
            )
            parts.append(found.with_columns(*named, pl.lit(ours).alias("field")).select(list(VALUES)))
    values = pl.concat(parts)
    nested = pl.col("value").str.contains(r"^[\[{]")
    return values.with_columns(
        pl.when(nested).then(pl.col("value").map_elements(one_spelling, pl.String)).otherwise(pl.col("value")).alias("value")
    )
