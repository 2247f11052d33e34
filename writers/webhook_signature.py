"""The signature of a Stripe webhook, checked over the raw body: pure, and against a clock that is given."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence

from pydantic import SecretStr

TIMESTAMP = re.compile(r"[0-9]{1,12}", re.ASCII)  # int() would also take " 1", "1_0", other scripts' digits, 5000 digits


class BadSignature(Exception):
    """Why a request is not from Stripe; `reason` is one word, safe to log and to count by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def verify_signature(header: str, body: bytes, secrets: Sequence[SecretStr], now: float, tolerance: int | float = 300) -> None:
    """Check Stripe's `Stripe-Signature` header over the raw body (https://docs.stripe.com/webhooks#verify-manually).

    Any of the secrets (two are active while one is rolled) may have made any of the `v1` signatures; other schemes are
    ignored, so nobody can downgrade. All pairs are compared, each in constant time. Why not the `stripe` library: it
    takes one secret, reads the wall clock, accepts any future timestamp and decodes the body first.

    Args:
        header: as HTTP gave it, `t=<unix seconds>,v1=<hex>[,v1=<hex>...]`.
        body: the request's body, not one byte changed.
        secrets: the active endpoint secrets; blank ones are ignored (anybody can sign with those).
        now: unix seconds.
        tolerance: seconds that the header's time may differ from `now`, either way.

    Raises:
        BadSignature: missing | malformed | no_v1 | mismatch | stale | future.
    """
    if not header:
        raise BadSignature("missing")
    items = [item.strip().partition("=") for item in header.split(",")]
    times = [value for name, _, value in items if name == "t"]
    if len(times) != 1 or not TIMESTAMP.fullmatch(times[0]):
        raise BadSignature("malformed")
    # As bytes, because compare_digest refuses text that is not ASCII.
    signatures = [value.encode("utf-8", "surrogatepass") for name, _, value in items if name == "v1"]
    if not signatures:
        raise BadSignature("no_v1")
    matches = False
    for secret in secrets:
        if not (key := secret.get_secret_value().encode()).strip():
            continue
        expected = hmac.new(key, times[0].encode() + b"." + body, hashlib.sha256).hexdigest().encode()
        for signature in signatures:
            matches |= hmac.compare_digest(expected, signature)
    if not matches:
        raise BadSignature("mismatch")
    age = now - int(times[0])  # only after the signature: a stale one tells of a replay or of a wrong clock
    if abs(age) > tolerance:
        raise BadSignature("stale" if age > 0 else "future")
