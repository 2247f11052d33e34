"""Signed webhooks over real HTTP, as Stripe sends them: several keep-alive connections, failures sent again."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import queue
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

ATTEMPTS = 8
FIRST_PAUSE_SECONDS = 0.05
TIMEOUT_SECONDS = 30.0


class DeliveryError(RuntimeError):
    """A webhook was refused, or still not accepted after all attempts."""


@dataclass(frozen=True, slots=True)
class Posted:
    """What became of some webhooks. `attempts` counts the requests, repeated ones included."""

    attempts: int
    accepted: int


def signature(secret: str, timestamp: int, body: bytes) -> str:
    """The `Stripe-Signature` header, scheme v1: HMAC-SHA256 of `{timestamp}.{body}`, in hexadecimal.

    https://docs.stripe.com/webhooks#verify-manually
    """
    digest = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={timestamp},v1={digest}"


class WebhookSender:
    """Posts bodies to one URL. Close it, or use it as a context manager."""

    def __init__(self, url: str, secret: str, connections: int = 8) -> None:
        """`url`: http only (the receiver is on this machine); `connections`: how many requests run at once.

        Raises:
            ValueError: when the URL is not http.
        """
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"the simulator posts to http URLs only, not to {url!r}")
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._secret = secret
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="webhook")
        self._free: queue.SimpleQueue[http.client.HTTPConnection] = queue.SimpleQueue()
        self._connections = [
            http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=TIMEOUT_SECONDS) for _ in range(connections)
        ]
        for connection in self._connections:
            self._free.put(connection)

    def __enter__(self) -> WebhookSender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for connection in self._connections:
            connection.close()

    def post(self, bodies: Sequence[tuple[str, bytes]], timestamp: int) -> Posted:
        """Post (event id, body) pairs concurrently, signed at `timestamp`; return when all are accepted.

        Raises:
            DeliveryError: on the first that is refused (4xx), or fails `ATTEMPTS` times.
        """
        if len(bodies) == 1:  # most bursts are small: no thread for one request
            attempts = self._post_one(bodies[0], timestamp)
        else:
            attempts = sum(self._pool.map(lambda one: self._post_one(one, timestamp), bodies))
        return Posted(attempts, len(bodies))

    def _post_one(self, one: tuple[str, bytes], timestamp: int) -> int:
        event_id, body = one
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
            "Stripe-Signature": signature(self._secret, timestamp, body),
        }
        connection, outcome = self._free.get(), ""
        try:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    connection.request("POST", self._path, body, headers)
                    response = connection.getresponse()
                    response.read()
                except (OSError, http.client.HTTPException) as error:
                    connection.close()  # the next request opens it again
                    outcome = f"{type(error).__name__}: {error}"
                else:
                    if 200 <= response.status < 300:
                        return attempt
                    outcome = f"HTTP {response.status}"
                    if 400 <= response.status < 500 and response.status != 429:
                        raise DeliveryError(f"webhook {event_id} was refused with {outcome}: check secret, clock and size")
                if attempt < ATTEMPTS:
                    time.sleep(min(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), 2.0))
        finally:
            self._free.put(connection)
        raise DeliveryError(f"webhook {event_id} was not accepted in {ATTEMPTS} attempts (last: {outcome}): is the receiver up?")
