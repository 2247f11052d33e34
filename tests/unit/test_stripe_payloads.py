"""Real payloads of several API versions through the normaliser: nothing that one carries and a column exists for is lost.

The normaliser is SQL made from catalog/reference/stripe_objects.yaml; here the same file is read by hand, in plain Python.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from lakehouse.declarations import load_declarations
from lakehouse.queries import bind_arrow, connect
from lakehouse.settings import ROOT, load_settings
from lakehouse.transforms import Built, Inputs, load_transforms
from tests.cases.test_cases import table_of

DATA = Path(__file__).parents[1] / "data" / "stripe"
REFERENCE = yaml.safe_load((ROOT / "catalog" / "reference" / "stripe_objects.yaml").read_text("utf-8"))
PLANS = [p["product_id"] for p in yaml.safe_load((ROOT / "catalog" / "reference" / "plans.yaml").read_text("utf-8"))]
ABSENT = object()


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.ndjson").read_text("utf-8").splitlines()]


@cache
def payloads() -> list[dict[str, Any]]:
    """Every event, with an id of its own, and every object as if fetched from the API; all in live mode."""
    events = [e for name in ("sync-engine-events", "ruby-mock-events") for e in lines(name)]
    found = [e | {"id": f"evt_{i}", "livemode": True} for i, e in enumerate(events)]
    objects = [o for name in ("dj-stripe-objects", "openapi-fixtures") for o in lines(name)]
    return found + [o | {"livemode": True} for o in objects if o.get("object") not in (None, "event") and "id" in o]


@cache
def built() -> Built:
    rows = [
        {
            "topic": "t",
            "partition": 0,
            "offset": i,
            "payload": json.dumps(p).encode(),
            "received_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=i),
            "source": "webhook" if p["object"] == "event" else "api_snapshot",
        }
        for i, p in enumerate(payloads())
    ]
    settings = load_settings()
    declarations = load_declarations(settings.catalog_dir)
    with connect(settings) as connection:
        bind_arrow(connection, "raw.stripe_events", table_of(declarations["raw.stripe_events"], rows))
        transform = load_transforms(settings.transforms_dir, declarations)["billing.event_versions"]
        return transform.build(Inputs(connection, settings.catalog_dir))


def at(value: Any, path: str) -> Any:
    """The value at `a.b[0].c`, ABSENT if there is none; below an explicit null there is null."""
    for step in re.findall(r"[^.\[\]]+", path):
        if value is None:
            return None
        if isinstance(value, list):
            value = value[int(step)] if int(step) < len(value) else ABSENT
        else:
            value = value.get(step, ABSENT) if isinstance(value, dict) else ABSENT
        if value is ABSENT:
            return ABSENT
    return value


def by_hand(columns: dict[str, list[str]], value: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, (_, *paths) in columns.items():
        values = [v for p in paths if (v := at(value, p)) is not ABSENT]
        # a null that only a parent says comes after what a later path carries
        said = [
            v
            for p in paths
            if (v := at(value, p)) is not ABSENT and (v is not None or at(value, p.rpartition(".")[0]) or "." not in p)
        ]
        if values:
            found[name] = said[0] if said else None
    return found


def kept(payload: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(type it is kept as, object) of a payload; None if it is not kept."""
    obj = payload["data"]["object"] if payload["object"] == "event" else payload
    kind = obj.get("object")
    if kind not in REFERENCE or "id" not in obj or payload.get("type") == "invoice.upcoming":
        return None
    return (REFERENCE[kind] if isinstance(REFERENCE[kind], str) else kind), obj


def plan_first(obj: dict[str, Any]) -> dict[str, Any]:
    """A subscription with the item that sells a plan in front."""
    items = at(obj, "items.data")
    if not isinstance(items, list):
        return obj
    chosen = sorted(items, key=lambda i: at(i, "price.product") not in PLANS)
    return obj | {"items": {"data": chosen}}


def test_every_payload_of_a_kind_we_keep_is_a_version_with_all_that_it_carries() -> None:
    rows = {(r["offset"], r["object_id"]): r for r in pl.DataFrame(built().rows).iter_rows(named=True) if not r["nested"]}
    refused = set(pl.DataFrame(built().rejected)["offset"])
    checked = 0
    for offset, payload in enumerate(payloads()):
        if (found := kept(payload)) is None or offset in refused:
            continue
        kind, obj = found
        row = rows[offset, obj["id"]]
        state, spec = json.loads(row["state"]), REFERENCE[kind]
        expected = by_hand(spec["columns"], plan_first(obj) if kind == "subscription" else obj)
        assert {k: v for k, v in state.items() if k in spec["columns"]} == expected, payload.get("type", kind)
        for name, nested in spec.get("lists", {}).items():
            items = at(obj, nested["at"])
            assert state.get(name) == ([by_hand(nested["columns"], i) for i in items] if isinstance(items, list) else None)
        assert row["object_type"] == kind
        checked += 1
    assert checked > 130
    # in the ruby fixtures two disputes have no id
    assert [r["reason"] for r in built().rejected.to_pylist()] == ["incomplete_event"] * 2


def test_every_field_of_these_payloads_is_known() -> None:
    """`extra` holds what is new to us; a payload of today has nothing new."""
    assert pl.DataFrame(built().rows)["extra"].drop_nulls().to_list() == []


def test_objects_inside_others_become_versions_of_their_own() -> None:
    rows = pl.DataFrame(built().rows)
    nested = set(rows.filter("nested")["object_type"])
    assert nested == {"refund", "balance_transaction", "charge"}


@pytest.mark.parametrize("kind", [k for k, v in REFERENCE.items() if not isinstance(v, str)])
def test_every_kind_is_among_the_payloads(kind: str) -> None:
    assert kind in set(pl.DataFrame(built().rows)["object_type"])
