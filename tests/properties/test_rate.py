"""The rate budget, on a clock of its own: never more than its share, whatever comes in between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from writers.rate import LOWEST, TokenBucket
from writers.stripe_api import LONGEST_RETRY_AFTER_SECONDS, retry_after


class Time:
    """A clock that moves when somebody sleeps, or by itself."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


steps = st.lists(st.one_of(st.floats(0, 3), st.tuples(st.just("429"), st.floats(0, 5))), max_size=60)


@given(steps, st.floats(0.5, 100), st.floats(1, 10))
def test_in_no_time_more_than_the_share(between: list[float | tuple[str, float]], rate: float, burst: float) -> None:
    time = Time()
    bucket = TokenBucket(rate, burst, time, time.sleep)
    sent = []
    for step in between:
        if isinstance(step, tuple):
            before = time.now
            bucket.refused(step[1])
            assert time.now >= before + step[1] - 1e-9
        else:
            time.now += step
        bucket.take()
        sent.append(time.now)
        assert rate * LOWEST - 1e-9 <= bucket.rate <= rate + 1e-9
    for i, first in enumerate(sent):
        for j in range(i, len(sent)):
            assert j - i + 1 <= rate * (sent[j] - first) + burst + 1e-6


def test_after_a_refusal_it_is_slower_and_recovers() -> None:
    time = Time()
    bucket = TokenBucket(10, 1, time, time.sleep)
    bucket.refused(2.0)
    assert (time.now, bucket.rate) == (2.0, 5.0)
    for _ in range(20):
        bucket.take()
    assert bucket.rate == 10
    assert bucket.waited > 2.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        (None, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-1"}, 0.0),
        ({"retry-after": "99999"}, LONGEST_RETRY_AFTER_SECONDS),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
    ],
)
def test_retry_after(headers: dict[str, str] | None, seconds: float | None) -> None:
    assert retry_after(headers) == seconds
