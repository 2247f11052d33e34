"""Feed a lake over the real declarations without a broker: rows are committed to raw tables as a writer would commit them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import polars as pl
import pyarrow as pa

from lakehouse.append import append_rows
from lakehouse.commit import Change, commit
from lakehouse.lake import Lake
from lakehouse.live import files_where
from lakehouse.positions import NUMBERED_HERE, vector_of
from lakehouse.queries import connect, query
from lakehouse.staging import stage
from simulator.workspaces import CrmChange, MembershipChange
from tests.cases.stripe import event
from writers.records import RAW_SCHEMA, received_by_kafka
from writers.stripe import with_envelope

CLEAN = ["product.identifications", "product.anonymous_user_history", "product.events"]
"""What has to run for product.events to take up records of its topic: it goes no further than what says who their users are."""


def at(text: str) -> datetime:
    """An ISO time."""
    return datetime.fromisoformat(text)


def _append(lake: Lake, name: str, topic: str, rows: pa.Table, source: str = "test/topic") -> None:
    table = lake.open_for_write(name)
    start = vector_of(table.metadata, name).get((topic, 0), 0)
    offsets = pa.array(range(start, start + rows.num_rows), pa.int64())
    rows = rows.set_column(rows.column_names.index("offset"), "offset", offsets)
    append_rows(lake, name, rows, {(topic, 0): start}, {(topic, 0): start + rows.num_rows}, {topic: source})


def _records(topic: str, payloads: list[bytes | None], received: list[datetime]) -> pa.Table:
    n = len(payloads)
    return pa.table([[topic] * n, [0] * n, [0] * n, received, [None] * n, [[]] * n, payloads], schema=RAW_SCHEMA)


def feed_stripe(lake: Lake, *specs: dict[str, Any]) -> None:
    """Webhooks, in the short spelling of the golden cases."""
    payloads: list[bytes | None] = [json.dumps(event(s)).encode() for s in specs]
    received = [at(s.get("received", s["at"])) for s in specs]
    with connect(lake.settings) as connection:
        _append(lake, "raw.stripe_events", "stripe", with_envelope(connection, _records("stripe", payloads, received)))


def feed_webhooks(lake: Lake, bodies: list[bytes], received: list[datetime]) -> None:
    """Webhooks as they were posted."""
    with connect(lake.settings) as connection:
        _append(lake, "raw.stripe_events", "stripe", with_envelope(connection, _records("stripe", list(bodies), received)))


def feed_payloads(lake: Lake, payloads: list[bytes], received: list[datetime]) -> None:
    """Product records as they were produced."""
    _append(lake, "raw.product_events", "product", received_by_kafka(_records("product", list(payloads), received)))


def feed_crm_rows(lake: Lake, changes: list[CrmChange]) -> None:
    """The CRM's mappings as they become visible."""
    said = {"workspace_id": [c.workspace_id for c in changes], "customer_id": [c.stripe_customer_id for c in changes]}
    states = [(c.effective_at.isoformat(), c.visible_at.isoformat(), c.deleted) for c in changes]
    _crm_versions(lake, "raw.crm_workspaces", "crm", said | {"mapping_id": [c.mapping_id for c in changes]}, states)


def feed_memberships(lake: Lake, changes: list[MembershipChange]) -> None:
    """The CRM's memberships as they become visible."""
    said = {c: [getattr(change, c) for change in changes] for c in ("user_id", "workspace_id", "role")}
    states = [(c.effective_at.isoformat(), c.visible_at.isoformat(), c.deleted) for c in changes]
    _crm_versions(lake, "raw.crm_memberships", "members", said, states)


def feed_product(lake: Lake, *events: dict[str, Any] | bytes | None, received: str, topic: str = "product") -> None:
    """Product events: a mapping becomes JSON with the usual fields filled in, bytes go as they are."""
    payloads = [e if e is None or isinstance(e, bytes) else json.dumps(product_event(e)).encode() for e in events]
    rows = received_by_kafka(_records(topic, payloads, [at(received)] * len(events)))
    _append(lake, "raw.product_events", topic, rows)


def product_event(spec: dict[str, Any]) -> dict[str, Any]:
    """A valid event of workspace ws_1, overridden by `spec`; a value of ... takes the field away."""
    full = {
        "event_id": "e1",
        "event_name": "feature_used",
        "occurred_at": "2026-01-10T12:00:00.000Z",
        "workspace_id": "ws_1",
        "user_id": "usr_1",
        "feature": "captions",
        "properties": {"k": 1},
        "schema_version": 3,
    } | spec
    return {k: v for k, v in full.items() if v is not ...}


def feed_crm(lake: Lake, *rows: tuple[str, str | None, str, str], mapping: str | None = None) -> None:
    """CRM versions: (workspace, customer, effective_at, updated_at). mapping: which of a workspace's rows in the CRM they are."""
    said = {"workspace_id": [r[0] for r in rows], "customer_id": [r[1] for r in rows], "mapping_id": [mapping] * len(rows)}
    _crm_versions(lake, "raw.crm_workspaces", "crm", said, [(r[2], r[3], False) for r in rows])


def feed_members(lake: Lake, *rows: tuple[str, str, str, str] | tuple[str, str, str, str, bool]) -> None:
    """Versions of memberships: (user, workspace, effective_at, updated_at), or these and whether it ended."""
    said = {"user_id": [r[0] for r in rows], "workspace_id": [r[1] for r in rows], "role": ["member"] * len(rows)}
    _crm_versions(lake, "raw.crm_memberships", "members", said, [(r[2], r[3], len(r) > 4) for r in rows])


def _crm_versions(lake: Lake, name: str, topic: str, said: dict[str, list[Any]], states: list[tuple[str, str, bool]]) -> None:
    n = len(states)
    table = {
        "topic": [topic] * n,
        "partition": pa.array([0] * n, pa.int32()),
        "offset": pa.array([0] * n, pa.int64()),
        "received_at": [at(updated) for _, updated, _ in states],
        **{column: pa.array(values, pa.string()) for column, values in said.items()},
        "effective_at": [at(effective) for effective, _, _ in states],
        "updated_at": [at(updated) for _, updated, _ in states],
        "deleted": [deleted for _, _, deleted in states],
    }
    _append(lake, name, topic, pa.table(table), NUMBERED_HERE)


def rows(lake: Lake, sql: str) -> list[dict[str, Any]]:
    """The answer to a question, as plain rows."""
    return query(lake, sql).to_pylist()


def rewritten(lake: Lake, name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Somebody replaces the rows of a table by others."""
    table = lake.load(name)
    current = table.current_snapshot()
    assert current is not None
    made = change(pl.DataFrame(table.scan().to_arrow()))
    files = stage(table, lake.declaration(name), made.to_arrow())
    commit(table, lake.run, Change(name, {}, {}, files, files_where(table), rewrite=True, base=current.snapshot_id))
