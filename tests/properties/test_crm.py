"""The CRM poll against a simulated database: late commits, clock steps, ties, silent changes, rows moved back in time, restarts.

The raw table is modelled as its files; which of them a poll reads, and what it makes of them, is the writer's own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import duckdb
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from writers.crm import Recorded, changed_versions, files_since, last_versions, read_since, vanished_versions
from writers.crm_source import MOMENT, CrmTable

SPEC = CrmTable(
    "workspaces", ["workspace_id"], {c: c for c in ("workspace_id", "customer_id", "effective_at", "updated_at", "deleted")}
)
KNOWN = SPEC.schema | {"received_at": MOMENT}
START = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
OVERLAP = 3 * HOUR
DUCKDB = duckdb.connect()

Row = tuple[Any, ...]
"""customer_id, effective_at, updated_at, deleted"""


def frame(rows: dict[str, Row]) -> pl.DataFrame:
    return pl.DataFrame([(w, *r) for w, r in rows.items()], SPEC.schema, orient="row")


class Simulated:
    """A CRM with a clock of its own, and the raw table that polls of it made: a frame a file, with offsets."""

    def __init__(self) -> None:
        self.crm: dict[str, Row] = {}
        self.skew = 0  # hours that the CRM's clock is ahead of ours
        self.now = START
        self.files: list[pl.DataFrame] = []
        self.committed: dict[str, datetime] = {}  # when each row last changed, by our clock

    def recorded(self) -> list[Recorded]:
        times = ("updated_at", "received_at")
        bounds = [(f["offset"].min(), f["offset"].max(), *(f[c].max() for c in times)) for f in self.files]
        return [Recorded(str(n), *b) for n, b in enumerate(bounds)]  # type: ignore[arg-type]

    def last(self, files: list[str] | None = None) -> pl.DataFrame:
        """The last version of each key, by the SQL that the writer runs."""
        chosen = self.files if files is None else [self.files[int(n)] for n in files]
        if not chosen:
            return pl.DataFrame(schema=KNOWN)
        DUCKDB.register("raw", pl.concat(chosen).to_arrow())
        return pl.DataFrame(DUCKDB.execute(last_versions("raw", SPEC)).to_arrow_table(), schema_overrides=KNOWN)

    def poll(self, *, compare: bool = False) -> pl.DataFrame:
        """One poll; returns what was new. What a narrower look at the raw table finds new is what a look at all of it does."""
        since = None if compare else read_since(self.recorded(), OVERLAP)
        present = frame({w: r for w, r in self.crm.items() if since is None or r[2] >= since})
        known = self.last(None if since is None else files_since(self.recorded(), since))
        new = changed_versions(known, present, self.now, SPEC.key)
        assert new.equals(changed_versions(self.last(), present, self.now, SPEC.key))
        if since is None:
            new = pl.concat([new, vanished_versions(known, present.select(SPEC.key), self.now, SPEC.key)])
        self.write(new)
        return new

    def write(self, new: pl.DataFrame) -> None:
        offset = sum(f.height for f in self.files)
        if new.height:
            numbered = new.with_columns(pl.int_range(offset, offset + new.height).alias("offset"))
            self.files.append(numbered.with_columns(pl.lit(self.now).cast(MOMENT).alias("received_at")))

    def compact(self, dice: int) -> None:
        """Two files become one, neighbours or not."""
        if len(self.files) > 1:
            other = self.files.pop(dice % len(self.files))
            place = dice // 7 % len(self.files)
            self.files[place] = pl.concat([self.files[place], other])

    def shown(self) -> dict[str, tuple[Any, bool]]:
        """What the raw table says now: {workspace: (customer, deleted)}."""
        return {w: (c, d) for w, c, _, _, d, _ in self.last().rows()}


keys = st.sampled_from(["ws_1", "ws_2", "ws_3"])
customers = st.sampled_from(["cus_1", "cus_2", None])
hours = st.integers(0, 6)
steps = st.one_of(
    # committed now, with an `updated_at` taken some hours ago, or ahead of time; soft deletes
    st.tuples(st.just("write"), keys, customers, st.integers(-2, 6), st.booleans()),
    st.tuples(st.just("silent"), keys, customers),  # `updated_at` not touched
    st.tuples(st.just("back"), keys, hours),  # moved back in time
    st.tuples(st.just("delete"), keys),
    st.tuples(st.just("clock"), st.integers(-5, 5)),
    st.tuples(st.just("wait"), st.integers(0, 3)),
    st.tuples(st.just("compact"), st.integers(0, 1000)),
    st.tuples(st.just("poll")),
    st.tuples(st.just("poll")),
    st.tuples(st.just("compare")),
)


def play(world: Simulated, step: tuple[Any, ...]) -> None:
    match step:
        case ("write", key, customer, lag, deleted):
            updated = world.now + (world.skew - lag) * HOUR
            world.crm[key] = (customer, updated - HOUR, updated, deleted)
        case ("silent", key, customer) if key in world.crm:
            world.crm[key] = (customer, *world.crm[key][1:])
        case ("back", key, by) if key in world.crm:
            customer, effective, updated, deleted = world.crm[key]
            world.crm[key] = (customer, effective - by * HOUR, updated - by * HOUR, deleted)
        case ("delete", key):
            world.crm.pop(key, None)
        case ("clock", by):
            world.skew = by
        case ("wait", by):
            world.now += by * HOUR
        case ("compact", dice):
            world.compact(dice)
    if step[0] in ("write", "silent", "back"):
        world.committed[step[1]] = world.now


def polls(script: list[tuple[Any, ...]]) -> Iterator[tuple[Simulated, pl.DataFrame, bool]]:
    """Play a script; after each poll: the world, what was new, whether it was a comparison."""
    world = Simulated()
    for step in [*script, ("compare",)]:
        world.now += timedelta(minutes=1)
        play(world, step)
        if step[0] in ("poll", "compare"):
            yield world, world.poll(compare=step[0] == "compare"), step[0] == "compare"


@given(st.lists(steps, max_size=14))
def test_a_comparison_records_all_that_stands_and_all_that_is_gone(script: list[tuple[Any, ...]]) -> None:
    for world, _, compared in polls(script):
        if compared:
            there = {w: (r[0], r[3]) for w, r in world.crm.items()}
            assert {w: s for w, s in world.shown().items() if w in there} == there
            assert all(deleted for w, (_, deleted) in world.shown().items() if w not in there)


@given(st.lists(steps, max_size=14))
def test_a_poll_records_every_row_committed_within_the_overlap(script: list[tuple[Any, ...]]) -> None:
    for world, _, _ in polls(script):
        recent = {w: r for w, r in world.crm.items() if r[2] >= world.committed[w] - OVERLAP}
        shown = world.shown()
        assert {w: shown.get(w) for w in recent} == {w: (r[0], r[3]) for w, r in recent.items()}


@given(st.lists(steps, max_size=14))
def test_no_version_is_recorded_twice(script: list[tuple[Any, ...]]) -> None:
    """Neither by a poll that is repeated, nor in a row of versions of one key."""
    for world, new, compared in polls(script):
        assert new["workspace_id"].is_unique().all()
        assert world.poll(compare=compared).is_empty()
    versions = pl.concat(world.files).sort("offset") if world.files else pl.DataFrame(schema=KNOWN)
    for _, of_key in versions.group_by("workspace_id"):
        seen = of_key.select(list(SPEC.schema)).rows()
        assert all(a != b for a, b in pairwise(seen))


@given(st.lists(steps, max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(script: list[tuple[Any, ...]], dice: Any) -> None:
    for world, _, _ in polls(script):
        known, present = world.last(), frame(world.crm)
        mixed = [f[dice.sample(range(f.height), f.height)] for f in (known, present)]
        assert changed_versions(*mixed, world.now, SPEC.key).equals(changed_versions(known, present, world.now, SPEC.key))


def test_a_row_from_the_future_does_not_hide_what_is_written_now() -> None:
    world = Simulated()
    world.crm["ws_1"] = ("cus_1", START, START + 10_000 * HOUR, False)
    world.poll()
    world.now += HOUR
    world.crm["ws_2"] = ("cus_2", world.now, world.now, False)
    assert world.poll()["workspace_id"].to_list() == ["ws_2"]


def known(rows: dict[str, Row], received_at: datetime) -> pl.DataFrame:
    return frame(rows).with_columns(pl.lit(received_at).cast(MOMENT).alias("received_at"))


def test_a_vanished_workspace_is_deleted_when_the_poll_saw_it_and_once() -> None:
    before = known({"ws_1": ("cus_1", START, START, False), "ws_2": ("cus_2", START, START, True)}, START + HOUR)
    seen_at = START + timedelta(days=1)
    gone = vanished_versions(before, frame({}).select(SPEC.key), seen_at, SPEC.key)
    assert gone.rows() == [("ws_1", "cus_1", seen_at, seen_at, True)]


def test_a_workspace_that_comes_back_holds_again_from_then_on() -> None:
    world = Simulated()
    world.crm["ws_1"] = row = ("cus_1", START, START, False)
    for there in (True, False, True, True):
        world.crm = {"ws_1": row} if there else {}
        world.now += timedelta(days=1)
        new = world.poll(compare=True)
    assert new.is_empty()
    back = START + timedelta(days=3)
    assert world.last().select(list(SPEC.schema)).rows() == [("ws_1", "cus_1", back, back, False)]
    world.crm["ws_1"] = moved = ("cus_2", back + HOUR, back + HOUR, False)
    assert world.poll().rows() == [("ws_1", *moved)]


def test_a_workspace_entered_again_holds_from_when_its_new_row_says() -> None:
    world = Simulated()
    world.crm["ws_1"] = ("cus_1", START, START, False)
    world.poll()
    world.now, world.crm = START + 24 * HOUR, {}
    world.poll(compare=True)
    world.now += HOUR
    world.crm["ws_1"] = again = (
        "cus_1",
        START + 24 * HOUR + timedelta(minutes=5),
        START + 24 * HOUR + timedelta(minutes=5),
        False,
    )
    assert world.poll().rows() == [("ws_1", *again)]


def test_a_workspace_that_comes_back_only_to_say_that_it_ended_is_taken_at_its_word() -> None:
    world = Simulated()
    world.crm["ws_1"] = ("cus_1", START, START, False)
    world.poll()
    world.now, world.crm = START + 24 * HOUR, {}
    world.poll(compare=True)
    world.crm["ws_1"] = ended = ("cus_1", START + HOUR, START + HOUR, True)
    assert world.poll(compare=True).rows() == [("ws_1", *ended)]
    assert world.poll(compare=True).is_empty()


def test_a_row_moved_back_and_forth_again_is_new_each_time() -> None:
    """The version that counts was written before the overlap, and recorded within it."""
    world = Simulated()
    world.crm["ws_1"] = row = ("cus_1", START, START + 10 * HOUR, False)
    world.now = START + 10 * HOUR
    world.poll()
    world.crm["ws_1"] = moved = ("cus_2", START, START + HOUR, False)
    world.now += HOUR
    assert world.poll(compare=True).rows() == [("ws_1", *moved)]
    world.crm["ws_1"] = row
    assert world.poll().rows() == [("ws_1", *row)]


def test_a_crm_restored_from_a_backup_is_taken_at_its_word() -> None:
    """Rows older than those known are kept as they are: the newer ones go on overriding them until they come again."""
    newer = known({"ws_1": ("cus_2", START + 3 * HOUR, START + 4 * HOUR, False)}, START + 5 * HOUR)
    restored = frame({"ws_1": ("cus_1", START, START, False)})
    assert changed_versions(newer, restored, START + timedelta(days=1), SPEC.key).equals(restored)


def test_a_row_moved_back_in_time_is_new_even_if_it_took_effect_when_it_was_written() -> None:
    """Equal times alone do not make it one that a poll noticed: that carries the time of its poll."""
    written = known({"ws_1": ("cus_1", START + 4 * HOUR, START + 4 * HOUR, False)}, START + 5 * HOUR)
    moved = frame({"ws_1": ("cus_1", START, START, False)})
    assert changed_versions(written, moved, START + timedelta(days=1), SPEC.key).equals(moved)


def test_a_first_read_takes_all() -> None:
    assert read_since([], OVERLAP) is None


@pytest.mark.parametrize("gone", [0, 1])
def test_files_are_chosen_by_their_statistics(gone: int) -> None:
    files = [Recorded("old", 0, 9, START, START), Recorded("new", 10, 19, START + 9 * HOUR, START + 9 * HOUR)]
    assert files_since(files[gone:], START + 5 * HOUR) == ["new"]
    assert files_since(files[gone:], START + 10 * HOUR) == []
