"""What befalls requests to a catalog or an object store while it is faulty: a rule for tests/proxy.py that draws lots.

What a client must survive differs by what was asked: a *commit* (the one request that swaps the table's metadata) may be lost
before or after it landed, be refused though it landed (as a client that sends twice is told), or land after its client gave
up; anything else fails, hangs or breaks off.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping

from tests.proxy import Answer, Request

COMMIT_FAULTS = ("lost_before", "lost_after", "landed_then_refused", "lands_late", "refused", "unavailable")
STORE_FAULTS = ("error", "reset", "slow", "stalled", "lost_after_write")
LATE_SECONDS = 0.4
SLOW_SECONDS = (0.1, 1.0)
BUSY = Answer(503, b"<Error><Code>SlowDown</Code><Message>busy</Message></Error>", (("Content-Type", "application/xml"),))

# How a catalog says, cleanly, that another commit was first.
REST_REFUSAL = Answer(409, json.dumps({"error": {"message": "stale", "type": "CommitFailedException", "code": 409}}).encode())
GLUE_REFUSAL = Answer(400, json.dumps({"__type": "ConcurrentModificationException", "Message": "stale"}).encode())


def rest_commit(request: Request) -> bool:
    """Whether a request to an Iceberg REST catalog commits to a table."""
    return request.method == "POST" and "/tables/" in request.path


def glue_commit(request: Request) -> bool:
    """Whether a request to Glue commits to a table."""
    return request.headers.get("x-amz-target") == "AWSGlue.UpdateTable"


class Odds:
    """The rule. Faithful until `set` says how likely each fault is; `counts` says how often each came.

    is_commit: which requests commit; an object store has none. refusal: how the catalog refuses one.
    """

    def __init__(self, is_commit: Callable[[Request], bool] = lambda _: False, refusal: Answer = REST_REFUSAL) -> None:
        self.counts: Counter[str] = Counter()
        self._is_commit, self._refusal = is_commit, refusal
        self._odds: Mapping[str, float] = {}
        self._dice = random.Random(0)
        self._lock = threading.Lock()

    def set(self, odds: Mapping[str, float], seed: str = "") -> None:
        """The probability of each fault, for the requests that it concerns."""
        with self._lock:
            self._odds, self._dice = odds, random.Random(seed)

    def __call__(self, request: Request, send: Callable[[], Answer]) -> Answer:
        """Carry a request out, or do to it what the lot says."""
        fault, slow = self._draw(request)
        if fault in ("lost_before", "reset"):
            raise ConnectionResetError
        if fault in ("unavailable", "error"):
            return BUSY
        if fault == "refused":
            return self._refusal
        if fault == "lands_late":
            threading.Timer(LATE_SECONDS, send).start()
            raise ConnectionResetError
        if fault == "slow":
            time.sleep(slow)
        answer = send()
        if fault in ("lost_after", "lost_after_write"):
            raise ConnectionResetError
        if fault == "landed_then_refused" and answer.status < 300:
            return self._refusal
        if fault == "stalled":  # half of it, and then silence
            return Answer(
                answer.status, answer.body[: len(answer.body) // 2], (*answer.headers, ("Content-Length", str(len(answer.body))))
            )
        return answer

    def _draw(self, request: Request) -> tuple[str, float]:
        """The fault that befalls a request (empty for most), and how slow a slow one is."""
        with self._lock:
            lot, slow = self._dice.random(), self._dice.uniform(*SLOW_SECONDS)
            for name in COMMIT_FAULTS if self._is_commit(request) else STORE_FAULTS:
                lot -= self._odds.get(name, 0.0)
                if lot < 0 and (request.method in ("PUT", "POST") or name != "lost_after_write"):
                    self.counts[name] += 1
                    return name, slow
        return "", 0.0
