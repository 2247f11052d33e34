"""A rate budget: at most so many requests a second, fewer after a refusal."""

from __future__ import annotations

import time
from collections.abc import Callable

LOWEST = 1 / 16  # of the full rate
RECOVERY = 1.05  # each request after a refusal may come this much faster than the one before, up to the full rate


class TokenBucket:
    """Lets requests through at `rate` a second: in any t seconds at most rate x t + `burst`. For one thread.

    Stripe refuses with 429 whatever goes over the account's limit, and so it would the payments of the product that share it:
    a background job asks for a bounded share, and for less when it is refused all the same.
    """

    def __init__(
        self,
        rate: float,
        burst: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._full = self._rate = rate
        self._burst, self._tokens = burst, burst
        self._clock, self._sleep = clock, sleep
        self._at = clock()
        self.waited = 0.0
        """Seconds spent waiting, all together."""

    @property
    def rate(self) -> float:
        """Requests a second at present."""
        return self._rate

    def take(self) -> None:
        """Wait until one more request may be sent."""
        self._refill()
        if self._tokens < 1:
            self._wait((1 - self._tokens) / self._rate)
        self._tokens -= 1
        self._rate = min(self._full, self._rate * RECOVERY)

    def refused(self, seconds: float) -> None:
        """A request was refused: send nothing for `seconds`, then go on at half the rate."""
        self._wait(seconds)
        self._rate = max(self._full * LOWEST, self._rate / 2)
        self._tokens = min(self._tokens, 1.0)

    def _refill(self) -> None:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now

    def _wait(self, seconds: float) -> None:
        deadline = self._clock() + seconds
        while (left := deadline - self._clock()) > 0:  # a sleep may end early
            self._sleep(left)
        self.waited += seconds
        self._refill()
