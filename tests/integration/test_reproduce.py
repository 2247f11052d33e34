"""Any snapshot of any table can be made again from the inputs that it records, by time travel and without the table."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import polars as pl
import pyarrow as pa
import pytest

from lakehouse.commit import Change, commit
from lakehouse.content import Content, content_at, content_of
from lakehouse.errors import UsageError
from lakehouse.lake import Lake, Run, history, open_lake
from lakehouse.live import files_where
from lakehouse.maintenance.run import maintain
from lakehouse.queries import connect
from lakehouse.reproduce import Record, record_of, reproduce
from lakehouse.runner import run
from lakehouse.settings import Settings
from lakehouse.staging import stage
from lakehouse.transforms import load_transforms, with_inputs
from tests.feed import feed_crm, feed_product, feed_stripe

EVENTS = "product.events"

# one of each way to build, each after its inputs
MADE = (
    "billing.event_versions",
    "billing.object_heads",
    "billing.subscription_history",
    "billing.plan_timeline",
    "billing.revenue_ledger",
    "billing.workspace_customer_history",
    EVENTS,
    "marts.workspace_engagement_daily",
)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Two rounds in small batches, in each something late: a plan change, a mapping, events, copies, what cannot be used."""
    lake = open_lake(Settings(home=tmp_path_factory.mktemp("lake") / "home", batch_rows=6), Run("test", "test"))
    for number, (day, price) in enumerate((("05", "starter"), ("03", "pro"))):
        at = f"2026-01-{day}T00:00:00Z"
        feed_stripe(
            lake,
            {"id": f"evt_{day}", "at": at, "subscription": {"price": price}, "received": f"2026-01-1{number}T11:00:00Z"},
            {"id": "evt_05", "at": "2026-01-05T00:00:00Z", "subscription": {"price": "starter"}},
            {"id": f"evt_ch{day}", "type": "charge.succeeded", "at": at, "charge": {"id": f"ch_{day}", "amount": 500}},
            {"id": f"evt_odd{day}", "at": at, "object": {"object": "charge", "amount": 1}},
        )
        feed_crm(lake, (f"ws_{number}", "cus_1", "2025-01-01T00:00:00Z", at))
        feed_product(
            lake,
            *(
                {"event_id": f"e{n % 7}", "workspace_id": f"ws_{n % 3}", "occurred_at": f"2026-01-0{1 + n}T12:00:00Z"}
                for n in range(9)
            ),
            {"event_id": f"late{number}", "workspace_id": "ws_1", "occurred_at": "2026-01-04T12:00:00Z"},
            b"never json",
            received=f"2026-01-1{number}T12:00:00Z",
        )
        run(lake, with_inputs(MADE, lake.declarations, load_transforms(lake.settings.transforms_dir, lake.declarations)))
    return lake


@pytest.mark.parametrize("name", MADE)
def test_a_table_is_made_again_as_it_is_and_as_it_was(lake: Lake, name: str) -> None:
    table = lake.load(name)
    for snapshot in {s.snapshot_id for s in (history(table)[0], history(table)[-1])}:
        record = record_of(lake, name, snapshot)
        done = reproduce(lake, record)
        assert done.same, (record, done.rows, done.hash)
        assert record.rows


def test_the_table_may_be_gone(lake: Lake) -> None:
    """What is needed of it is in its record, which passes through JSON."""
    record = msgspec.json.decode(msgspec.json.encode(record_of(lake, EVENTS)), type=Record)
    assert record.rows == 11
    kept = lake.load(EVENTS).metadata_location
    lake.catalog.drop_table(EVENTS)
    try:
        assert reproduce(lake, record).same
        assert not lake.exists(EVENTS)
    finally:
        lake.catalog.register_table(EVENTS, kept)


def test_rows_that_the_inputs_do_not_give_are_told(lake: Lake) -> None:
    """Somebody changes a row by hand; maintenance after it hides nothing."""
    table = lake.load(EVENTS)
    before = table.current_snapshot()
    assert before is not None
    rows = pl.DataFrame(table.scan().to_arrow())
    first = rows["occurred_at"].min()
    forged = rows.with_columns(plan=pl.when(pl.col("occurred_at") == first).then(pl.lit("enterprise")).otherwise("plan"))
    files, old = stage(table, lake.declaration(EVENTS), forged.to_arrow()), files_where(table)
    inputs = {k: int(v) for k, v in record_of(lake, EVENTS).inputs.items()}
    commit(table, lake.run, Change(EVENTS, {}, {}, files, old, rewrite=True, base=before.snapshot_id, inputs=inputs))
    list(maintain(lake, [EVENTS], ["compact"]))
    record = record_of(lake, EVENTS)
    done = reproduce(lake, record)
    assert (done.same, done.rows) == (False, record.rows)
    assert reproduce(lake, record_of(lake, EVENTS, before.snapshot_id)).same


def test_what_cannot_be_reproduced_says_why(lake: Lake) -> None:
    with pytest.raises(UsageError, match="is what was received"):
        reproduce(lake, record_of(lake, "raw.product_events"))
    record = record_of(lake, EVENTS)
    lost = msgspec.structs.replace(record, inputs=record.inputs | {"billing.plan_timeline": 7})
    with pytest.raises(UsageError, match=r"billing\.plan_timeline no longer keeps snapshot 7.*lakehouse tag"):
        reproduce(lake, lost)
    # raw is read by offsets, so that its snapshots may expire
    assert reproduce(
        lake, msgspec.structs.replace(record_of(lake, "billing.event_versions"), inputs={"raw.stripe_events": 7})
    ).same


def test_content_is_of_values_alone(lake: Lake, tmp_path: Path) -> None:
    rows = pa.table({"a": [1, 2, None, 2], "b": ["x", None, "", "x"], "at": [datetime(2026, 1, 1, tzinfo=UTC)] * 4})
    with connect(lake.settings) as connection:

        def content(part: pa.Table) -> Content:
            connection.register("part", part)
            return content_of(connection, "part", part.column_names)

        whole = content(rows)
        assert whole == content(rows.take([3, 1, 0, 2]).select(["at", "b", "a"]))
        assert whole == content(rows.slice(0, 1)) + content(rows.slice(1))
        assert len({content(rows.slice(i, 2)).hash for i in range(3)}) == 3
        assert content(rows.slice(0, 0)) == Content() == content_at(connection, lake.load(EVENTS), None)
        null, empty = pa.table({"b": pa.array([None], pa.string())}), pa.table({"b": [""]})
        assert content(null) != content(empty)
