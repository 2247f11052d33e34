"""Which copy of an event counts: a function of the set of copies, pure and on the full path, whatever the batches."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lakehouse.ids import probe
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.runner import run
from lakehouse.settings import Settings
from tests.feed import CLEAN, feed_product, rows
from transforms.product.duplicates import CONTENT, first_of_batch

ZERO = datetime(2026, 1, 10, tzinfo=UTC)
copies = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 2), st.sampled_from(["x", "y"])), min_size=1, max_size=25
)


TOPICS = ("later", "first")  # of equal receipts that of the lower topic counts


def frame(found: list[tuple[int, int, int, str]]) -> pl.DataFrame:
    """(id, day, second of receipt, content); offsets as listed, in two topics in turn. Ids 2 and 3 have the same hash."""
    return pl.DataFrame(
        [
            dict.fromkeys(CONTENT) | {
                "event_id": f"e{i}", "id_hash": min(i, 2), "occurred_at": ZERO + timedelta(days=day),
                "topic": TOPICS[n % 2], "partition": 0, "offset": n,
                "received_at": ZERO + timedelta(seconds=second), "user_id": content, "content_hash": ord(content),
            }
            for n, (i, day, second, content) in enumerate(found)
        ],
        schema_overrides=dict.fromkeys((c for c in CONTENT if c != "occurred_at"), pl.String),
    )  # fmt: skip


@given(copies, st.randoms(use_true_random=False))
def test_the_first_receipt_counts_in_any_order(found: list[tuple[int, int, int, str]], rng: Any) -> None:
    events = frame(found)
    order = list(range(len(found)))
    rng.shuffle(order)
    kept, conflicts = first_of_batch(events[order])
    wanted: dict[tuple[int, int], tuple[int, str, int, str]] = {}
    for n, (i, day, second, content) in enumerate(found):
        copy = (second, TOPICS[n % 2], n, content)
        wanted[i, day] = min(wanted.get((i, day), copy), copy)
    assert sorted(kept["offset"]) == sorted(n for *_, n, _ in wanted.values())
    contradict = [n for n, (i, day, _, content) in enumerate(found) if content != wanted[i, day][-1]]
    assert sorted(conflicts["offset"]) == contradict


@given(st.sets(st.integers(0, 50)), st.lists(st.integers(0, 50)))
def test_a_probe_finds_what_is_there(known: set[int], asked: list[int]) -> None:
    index = pl.DataFrame({"id": sorted(known), "also": [-k for k in sorted(known)]}, schema={"id": pl.UInt64, "also": pl.Int64})
    found = probe(index, pl.Series(asked, dtype=pl.UInt64))
    assert found.rows() == [(n, -a) for n, a in enumerate(asked) if a in known]


COPIES = [
    ({"event_id": "e"}, "2026-01-10T12:00:05Z"),
    ({"event_id": "e", "sent_at": "2026-01-10T12:00:08Z", "ip": "10.0.0.9"}, "2026-01-10T12:00:09Z"),
    ({"event_id": "e", "user_id": "usr_2"}, "2026-01-10T12:00:10Z"),
    ({"event_id": "e", "workspace_id": "ws_2", "occurred_at": "2026-01-10T11:00:00Z"}, "2026-01-10T12:00:11Z"),
    ({"event_id": "e", "occurred_at": "2026-01-09T12:00:00Z"}, "2026-01-10T12:00:12Z"),
    ({"event_id": "twin", "occurred_at": "2026-01-08T12:00:00Z"}, "2026-01-10T12:00:13Z"),
    ({"event_id": "twin", "occurred_at": "2026-01-08T12:00:00Z"}, "2026-01-10T12:00:13Z"),
]
"""The first; sent again; with another user; with another time and workspace; of another day, which is another event; two
received in the same moment by two topics."""


def answer(path: Path, order: list[int], ends: set[int], forget: bool) -> tuple[list[Any], list[Any]]:
    lake: Lake = open_lake(Settings(home=path), Run("test", "test"))
    for n, i in enumerate(order):
        event, received = COPIES[i]
        feed_product(lake, event, received=received, topic=f"p{i}")
        if n in ends:
            run(lake, CLEAN)
            if forget:
                shutil.rmtree(path / "cache", ignore_errors=True)
    run(lake, CLEAN)
    events = rows(lake, 'SELECT * EXCLUDE ("offset") FROM product.events ORDER BY occurred_at')
    return events, rows(lake, "SELECT topic, reason, detail FROM ops.dead_letters ORDER BY ALL")


@settings(max_examples=4, deadline=None)
@given(order=st.permutations(range(len(COPIES))), ends=st.sets(st.integers(0, 3)), forget=st.booleans())
@example(order=[6, 5, 4, 3, 2, 1, 0], ends={0}, forget=False)
def test_the_table_does_not_depend_on_batches(tmp_path_factory: Any, order: list[int], ends: set[int], forget: bool) -> None:
    path = tmp_path_factory.mktemp("copies")
    events, letters = answer(path / "one", order, ends, forget)
    assert [(e["topic"], e["occurred_at"].day, e["user_id"], e["workspace_id"]) for e in events] == [
        ("p5", 8, "usr_1", "ws_1"),
        ("p4", 9, "usr_1", "ws_1"),
        ("p0", 10, "usr_1", "ws_1"),
    ]
    conflicts = {r["topic"]: r["detail"] for r in letters if r["reason"] == "conflicting_copy"}
    assert {"p2", "p3"} <= conflicts.keys()
    whole, told = answer(path / "whole", sorted(order), set(), forget=False)
    assert events == whole
    assert {r["topic"] for r in told} == {"p2", "p3"}
    assert next(r["detail"] for r in told if r["topic"] == "p2") == "differs from the first receipt in: user_id"
