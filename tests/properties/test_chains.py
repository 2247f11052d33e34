"""Order within one second: generated from true chains of changes, then shuffled."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from hypothesis import assume, given
from hypothesis import strategies as st

from lakehouse.chains import MAX_SEARCHED, State, Version, follows, order_group, sequence_in_second

values = st.sampled_from(["active", "past_due", None, 1])
state = st.fixed_dictionaries({"status": values, "seats": values, "plan": values})


@st.composite
def chains(draw: st.DrawFn, smallest: int = 2, largest: int = 4) -> tuple[State | None, list[Version]]:
    """(the state before, versions in true order): each names what it replaced; it may return to an earlier state."""
    before: dict[str, Any] = draw(state)
    anchor = draw(st.sampled_from([before, before, None]))
    ids = draw(st.permutations([f"evt_{i}" for i in range(largest)]))
    found = []
    for i in range(draw(st.integers(smallest, largest))):
        after: dict[str, Any] = before | draw(st.dictionaries(st.sampled_from(["status", "seats", "plan"]), values, max_size=2))
        changed: dict[str, Any] = {k: before[k] for k in before if before[k] != after[k]}
        said = draw(st.sampled_from([changed, changed, changed, None]))
        found.append(Version(after, said, draw(st.integers(0, 2)), ids[i]))
        before = after
    return anchor, found


def links(versions: Sequence[Version], anchor: State | None) -> int:
    """How many versions follow the one before them."""
    states = [anchor, *(v.state for v in versions)]
    return sum(follows(v, s) for v, s in zip(versions, states, strict=False))


@given(chains())
def test_every_permutation_gives_the_same_order(chain: tuple[State | None, list[Version]]) -> None:
    anchor, versions = chain
    found = {tuple(p[i].event_id for i in order_group(p, anchor)) for p in itertools.permutations(versions)}
    assert len(found) == 1


@given(chains())
def test_no_order_links_more_versions(chain: tuple[State | None, list[Version]]) -> None:
    anchor, versions = chain
    found = [versions[i] for i in order_group(versions, anchor)]
    assert sorted(v.event_id for v in found) == sorted(v.event_id for v in versions)
    assert links(found, anchor) == max(links(p, anchor) for p in itertools.permutations(versions))


def whole(version: Version, before: Mapping[str, Any]) -> bool:
    """Whether `version` can have replaced `before`: what it names was there, and all else is still as it was."""
    assert version.previous is not None
    return {**version.state, **version.previous} == before


@given(chains())
def test_the_true_order_is_found_when_only_one_is_possible(chain: tuple[State | None, list[Version]]) -> None:
    anchor, versions = chain
    assume(anchor is not None)
    assert anchor is not None
    assume(all(v.previous is not None for v in versions))

    def possible(order: Sequence[Version]) -> bool:
        return all(whole(v, s) for v, s in zip(order, [anchor, *(v.state for v in order)], strict=False))

    assume(sum(possible(p) for p in itertools.permutations(versions)) == 1)
    assert order_group(versions, anchor) == list(range(len(versions)))


@given(chains())
def test_the_last_state_is_the_true_one_when_all_is_known(chain: tuple[State | None, list[Version]]) -> None:
    """Two orders may be possible (a cycle run twice), but where each step is known they end alike."""
    anchor, versions = chain
    assume(anchor is not None)
    assume(all(v.previous is not None for v in versions))
    assert versions[order_group(versions, anchor)[-1]].state == versions[-1].state


@given(chains(), st.randoms(use_true_random=False))
def test_a_null_and_an_absent_value_are_the_same(chain: tuple[State | None, list[Version]], dice: Any) -> None:
    anchor, versions = chain

    def thinned(of: State | None) -> State | None:
        return None if of is None else {k: v for k, v in of.items() if v is not None or dice.random() < 0.5}

    # in `previous` a null that is left out would say that the value did not change
    rewritten = [Version(thinned(v.state) or {}, v.previous, v.rank, v.event_id) for v in versions]
    assert order_group(rewritten, thinned(anchor)) == order_group(versions, anchor)


@given(chains(smallest=MAX_SEARCHED + 1, largest=MAX_SEARCHED + 4), st.randoms(use_true_random=False))
def test_a_large_group_too_does_not_depend_on_the_order_it_came_in(chain: tuple[State | None, list[Version]], dice: Any) -> None:
    anchor, versions = chain
    shuffled = dice.sample(versions, len(versions))
    found = [[v[i].event_id for i in order_group(v, anchor)] for v in (versions, shuffled)]
    assert found[0] == found[1]


def test_a_long_chain_is_followed_link_by_link() -> None:
    versions = [Version({"n": i + 1}, {"n": i}, 1, f"evt_{(i * 7) % 20:02}") for i in range(20)]
    assert order_group(versions, {"n": 0}) == list(range(20))


# --- by example --------------------------------------------------------------------------------------------------------

DOWN = Version({"status": "past_due"}, {"status": "active"}, 1, "evt_2")
UP = Version({"status": "active"}, {"status": "past_due"}, 1, "evt_1")


def test_a_cycle_is_broken_by_the_state_before_it() -> None:
    assert order_group([UP, DOWN], {"status": "active"}) == [1, 0]
    assert order_group([UP, DOWN], {"status": "past_due"}) == [0, 1]
    assert order_group([UP, DOWN], None) == order_group([DOWN, UP], None)[::-1]  # by event id


def test_what_says_nothing_of_before_goes_by_rank_then_event_id() -> None:
    created = Version({"status": "trialing"}, None, 0, "evt_9")
    deleted = Version({"status": "canceled"}, None, 2, "evt_0")
    updated = Version({"status": "active"}, {"status": "trialing"}, 1, "evt_1")
    assert order_group([deleted, updated, created], None) == [2, 1, 0]
    twins = [Version({"status": "active"}, None, 1, "evt_b"), Version({"status": "paused"}, None, 1, "evt_a")]
    assert order_group(twins, {"status": "trialing"}) == [1, 0]
    assert order_group(twins, {"status": "active"}) == [0, 1]  # the first of them changes nothing


def test_where_the_chain_says_nothing_the_life_cycle_decides() -> None:
    """Events that name no previous values, their ids against the order of life."""
    life = [("created", 0, 0), ("finalized", 1, 1), ("payment failed", 1, 2), ("paid", 1, 3)]
    versions = [Version({"status": name}, None, rank, f"evt_{9 - n}", (n,)) for name, rank, n in life]
    for size in (2, 3, 4):
        for given_order in itertools.permutations(versions[:size]):
            for anchor in (None, {"status": "draft"}):
                found = [given_order[i] for i in order_group(given_order, anchor)]
                assert found == versions[:size]


def test_the_chain_outweighs_the_life_cycle() -> None:
    back = Version({"status": "active"}, {"status": "past_due"}, 1, "evt_1", (1,))
    down = Version({"status": "past_due"}, {"status": "active"}, 1, "evt_2", (2,))
    assert order_group([back, down], {"status": "active"}) == [1, 0]
    assert order_group([back, down], None) == [0, 1]


def test_an_update_whose_predecessor_is_unknown_does_not_come_before_an_earlier_stage_for_that() -> None:
    """Nothing is known of before: that `paid` names no previous values does not make it the first."""
    paid = Version({"status": "paid", "n": 1}, None, 1, "evt_1", (3,))
    opened = Version({"status": "open", "n": 1}, {"status": "draft"}, 1, "evt_2", (1,))
    assert order_group([paid, opened], None) == [1, 0]


def test_what_was_fetched_stands_where_its_whole_state_does() -> None:
    for fetched, place in (("active", 0), ("past_due", 1)):
        snapshot = Version({"status": fetched}, None, 1, "snapshot_1", (9,))
        assert order_group([DOWN, snapshot], {"status": "active"})[place] == 1


def test_a_change_of_nothing_we_keep_stands_where_the_rest_is_as_it_says() -> None:
    """`previous` is {} when only columns we do not keep have changed; such a version could follow any other."""
    nothing = Version({"status": "active"}, {}, 1, "evt_3")
    assert order_group([nothing, DOWN], {"status": "active"}) == [0, 1]
    still_down = Version({"status": "past_due"}, {}, 1, "evt_0")
    assert order_group([still_down, DOWN], {"status": "active"}) == [1, 0]


def test_sequences_in_a_frame() -> None:
    """One crowded object beside plain ones; the state of an earlier second anchors the later one."""
    rows: list[tuple[str, int, Any, Any, int, str]] = [
        ("s1", 1, {"status": "active"}, None, 0, "evt_5"),
        ("s1", 2, {"status": "active"}, {"status": "past_due"}, 1, "evt_1"),
        ("s1", 2, {"status": "past_due"}, {"status": "active"}, 1, "evt_2"),
        ("s2", 2, {"status": "active"}, None, 0, "evt_6"),
    ]
    names = ["id", "at", "state", "previous", "rank", "event_id"]
    frame = pl.DataFrame(
        [(i, at, json.dumps(s), None if p is None else json.dumps(p), r, e) for i, at, s, p, r, e in rows],
        dict(zip(names, (pl.String, pl.Int64, pl.String, pl.String, pl.Int32, pl.String), strict=True)),
        orient="row",
    )
    expected = {"evt_5": 0, "evt_1": 1, "evt_2": 0, "evt_6": 0}
    for given_frame in (frame, frame.reverse(), frame.sort("event_id")):
        found = sequence_in_second(given_frame, keys=["id"], time="at")
        assert dict(found.select("event_id", "sequence").rows()) == expected
        assert found.schema["sequence"] == pl.Int32
        assert found.columns == [*names, "sequence"]
    assert sequence_in_second(frame.clear(), keys=["id"], time="at").columns == [*names, "sequence"]
