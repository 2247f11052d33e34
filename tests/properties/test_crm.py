"""The CRM poll: folding the versions it writes gives back what the CRM showed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from writers.crm import SCHEMA, changed_versions

START = datetime(2026, 1, 1, tzinfo=UTC)
moment = st.integers(0, 5).map(lambda hours: START + timedelta(hours=hours))
mapping = st.tuples(st.sampled_from(["cus_1", "cus_2", None]), moment, moment, st.booleans())
polls = st.lists(st.dictionaries(st.sampled_from(["ws_1", "ws_2", "ws_3"]), mapping), min_size=1, max_size=5)

Shown = dict[str, tuple[Any, ...]]


def frame(shown: Shown) -> pl.DataFrame:
    return pl.DataFrame([(w, *m) for w, m in shown.items()], SCHEMA, orient="row")


def last(versions: pl.DataFrame) -> pl.DataFrame:
    """What the raw table would say is known: the last version written of each workspace."""
    return versions.unique("workspace_id", keep="last", maintain_order=True)


@given(polls)
def test_the_versions_written_say_what_every_poll_showed(shown: list[Shown]) -> None:
    written = pl.DataFrame(schema=SCHEMA)
    for hour, present in enumerate(shown):
        seen_at = START + timedelta(days=1, hours=hour)
        new = changed_versions(last(written), frame(present), seen_at)
        assert new["workspace_id"].is_unique().all()
        assert new.columns == list(SCHEMA)
        written = pl.concat([written, new])
        known = {w: tuple(m) for w, *m in last(written).rows()}
        assert {w: (known[w][0], known[w][3]) for w in present} == {w: (m[0], m[3]) for w, m in present.items()}
        assert all(known[w][3] for w in known if w not in present)  # what has vanished is deleted
        assert changed_versions(last(written), frame(present), seen_at + timedelta(minutes=1)).is_empty()


@given(polls, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(shown: list[Shown], dice: Any) -> None:
    known, present = frame(shown[0]), frame(shown[-1])
    mixed = [f[dice.sample(range(f.height), f.height)] for f in (known, present)]
    seen_at = START + timedelta(days=1)
    assert changed_versions(mixed[0], mixed[1], seen_at).equals(changed_versions(known, present, seen_at))


def test_a_vanished_workspace_is_deleted_when_the_poll_saw_it_and_once() -> None:
    known = frame({"ws_1": ("cus_1", START, START, False), "ws_2": ("cus_2", START, START, True)})
    seen_at = START + timedelta(days=1)
    gone = changed_versions(known, frame({}), seen_at)
    assert gone.rows() == [("ws_1", "cus_1", seen_at, seen_at, True)]
    assert changed_versions(gone, frame({}), seen_at + timedelta(days=1)).is_empty()


def test_a_workspace_that_comes_back_holds_again_from_then_on() -> None:
    shown = frame({"ws_1": ("cus_1", START, START, False)})
    day = [START + timedelta(days=n) for n in range(5)]
    gone = changed_versions(shown, frame({}), day[1])
    back = changed_versions(gone, shown, day[2])
    assert back.rows() == [("ws_1", "cus_1", day[2], day[2], False)]
    assert changed_versions(back, shown, day[3]).is_empty()
    moved = frame({"ws_1": ("cus_2", day[3], day[3], False)})
    assert changed_versions(back, moved, day[4]).equals(moved)


def test_a_crm_restored_from_a_backup_is_taken_at_its_word() -> None:
    """Rows older than those known are kept as they are: the newer ones go on overriding them until they come again."""
    known = frame({"ws_1": ("cus_2", START + timedelta(hours=3), START + timedelta(hours=4), False)})
    restored = frame({"ws_1": ("cus_1", START, START, False)})
    assert changed_versions(known, restored, START + timedelta(days=1)).equals(restored)
