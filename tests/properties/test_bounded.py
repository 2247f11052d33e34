"""Micro-batches: how far one run reaches, and that many runs arrive."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lakehouse.cuts import bounded
from lakehouse.positions import TopicPartition

Offsets = dict[TopicPartition, int]

keys = st.sampled_from([("events", 0), ("events", 1), ("events", 2), ("stripe", 0), ("crm", 0)])
vectors = st.dictionaries(keys, st.integers(0, 500))
limits = st.integers(1, 400)
DRIVER = {"events", "stripe"}


def behind(expected: Offsets, cut: Offsets) -> Offsets:
    return {k: cut[k] - expected.get(k, 0) for k in cut if k[0] in DRIVER and cut[k] > expected.get(k, 0)}


@given(vectors, vectors, limits)
def test_it_never_passes_the_cut_and_always_gets_on(expected: Offsets, cut: Offsets, limit: int) -> None:
    reached, caught_up = bounded(expected, cut, DRIVER, limit)
    assert set(reached) == set(cut)
    assert all(reached[k] <= cut[k] for k in cut)
    left = behind(expected, cut)
    for key, missing in left.items():
        assert expected.get(key, 0) < reached[key] <= expected.get(key, 0) + missing
    assert all(reached[k] == cut[k] for k in cut if k not in left)
    assert caught_up == (reached == cut) or not left
    assert sum(reached[k] - expected.get(k, 0) for k in left) <= limit + len(left)


@given(vectors, vectors, limits)
def test_partitions_share_a_batch_by_how_far_behind_they_are(expected: Offsets, cut: Offsets, limit: int) -> None:
    reached, caught_up = bounded(expected, cut, DRIVER, limit)
    left = behind(expected, cut)
    if caught_up or not left:
        return
    total = sum(left.values())
    for key, missing in left.items():
        share = (reached[key] - expected.get(key, 0)) - missing * limit / total
        assert 0 <= share < 1  # rounded up


@given(vectors, vectors, st.integers(20, 400))
def test_runs_arrive_at_the_cut(expected: Offsets, cut: Offsets, limit: int) -> None:
    start = {k: min(expected.get(k, 0), v) for k, v in cut.items()}
    for _ in range(200):
        start, caught_up = bounded(start, cut, DRIVER, limit)
        if caught_up:
            break
    assert start == cut
