"""Golden cases: `tests/cases/<layer>/<table>/<behaviour>.yaml` says what is given and what the table must hold.

A case runs the transforms alone, in memory: tables that are not given are built from those that are, as in production. Each
case is run with its rows in the order given, reversed and shuffled: the answer must not depend on it.
"""

from __future__ import annotations

import random
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pyiceberg.io.pyarrow import schema_to_pyarrow

from lakehouse.declarations import Declaration, load_declarations
from lakehouse.in_memory import PARAMETERS, build_tables
from lakehouse.settings import load_settings
from lakehouse.transforms import Built, load_transforms
from tests.cases.stripe import raw_row

HERE = Path(__file__).parent
CASES = sorted(HERE.glob("*/*/*.yaml"))


def table_of(declared: Declaration, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows (missing columns NULL, times as ISO text, payloads as text) with the columns and types of the declaration."""
    schema = schema_to_pyarrow(declared.schema(), include_field_ids=False)
    nullable = pa.schema([f.with_nullable(True) for f in schema])
    parsed = [
        {
            k: datetime.fromisoformat(v) if isinstance(v, str) and k.endswith(("_at", "_from", "_to", "_start", "_end")) else v
            for k, v in r.items()
        }
        for r in rows
    ]
    parsed = [{k: v.encode() if k == "payload" and isinstance(v, str) else v for k, v in r.items()} for r in parsed]
    return pa.Table.from_pylist([{f.name: r.get(f.name) for f in nullable} for r in parsed], schema=nullable)


def run_case(case: dict[str, Any], table: str, shuffle: int) -> tuple[pa.Table, Built]:
    """Build `table` from what the case gives."""
    settings = load_settings()
    declarations = load_declarations(settings.catalog_dir)
    given: dict[str, pa.Table] = {}
    for name, rows in case["given"].items():
        full = [raw_row(r, i) if name == "raw.stripe_events" else {"offset": i, **r} for i, r in enumerate(rows)]
        if shuffle == 1:
            full.reverse()
        elif shuffle > 1:
            random.Random(shuffle).shuffle(full)
        given[name] = table_of(declarations[name], full)

    built = build_tables(settings, given, [table], PARAMETERS | case.get("parameters", {}))[table]
    return built.rows, built


@pytest.mark.parametrize("shuffle", [0, 1, 2, 3], ids=["given", "reversed", "shuffled", "shuffled2"])
@pytest.mark.parametrize("path", CASES, ids=[f"{p.parent.parent.name}.{p.parent.name}-{p.stem}" for p in CASES])
def test_case(path: Path, shuffle: int) -> None:
    case = yaml.safe_load(path.read_text("utf-8"))
    assert set(case) <= {"doc", "given", "parameters", "expect", "rejected"}, "unknown key in the case"
    rows, built = run_case(case, f"{path.parent.parent.name}.{path.parent.name}", shuffle)
    expected = case["expect"]
    columns = list(expected[0]) if expected else []
    found = [{c: show(r[c]) for c in columns} for r in rows.to_pylist()]
    assert sorted(found, key=str) == sorted(expected, key=str)
    if "rejected" in case:
        assert built.rejected is not None
        assert sorted(built.rejected.column("reason").to_pylist()) == sorted(case["rejected"])


def show(value: Any) -> Any:
    """A value as the cases write it: times as ISO text with Z."""
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else value


def test_every_transform_has_a_case() -> None:
    settings = load_settings()
    transforms = load_transforms(settings.transforms_dir, load_declarations(settings.catalog_dir))
    tested = {f"{p.parent.parent.name}.{p.parent.name}" for p in CASES}
    # product.events plans its own files: its cases run on a real lake, tests/integration/test_product_events.py
    assert set(transforms) - tested == {"product.events"}
