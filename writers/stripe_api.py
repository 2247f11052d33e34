"""The Stripe API as reconciliation reads it: lists page by page, byte for byte, within a rate budget, with failures retried.

The `stripe` library speaks the protocol. It does not retry a plain 429 and knows no budget, so both are here; its own retries
are off, so that each request takes a token.
"""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import stripe

from lakehouse.errors import Retryable, Terminal, UsageError
from lakehouse.settings import Settings
from writers.rate import TokenBucket

PAGE = 100  # the most that Stripe gives at once
ATTEMPTS = 8
REFUSALS = 30
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0
LONGEST_RETRY_AFTER_SECONDS = 300.0
TIMEOUT_SECONDS = 30.0


class Item(msgspec.Struct, frozen=True):
    """One element of a list: what is needed to page and compare; `body` is its text as received."""

    id: str
    created: int
    body: bytes


class _Listed(msgspec.Struct):
    data: list[msgspec.Raw]
    has_more: bool


class _Head(msgspec.Struct):
    id: str
    created: int = 0


_listed, _head = msgspec.json.Decoder(_Listed), msgspec.json.Decoder(_Head)


@dataclass(frozen=True)
class Page:
    """A page of a list as it was at `at`, the response's `Date` (epoch seconds, Stripe's clock)."""

    items: list[Item]
    has_more: bool
    at: int


@dataclass
class Spent:
    """What a run asked of Stripe: requests sent, refused for their rate (429), and failed otherwise and sent again."""

    requests: int = 0
    refused: int = 0
    failed: int = 0


class StripeReader:
    """Reads one account in one mode. `account`: a connected account (None: the one that the key belongs to)."""

    def __init__(
        self,
        settings: Settings,
        account: str | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        """Raises: UsageError: no key is set."""
        if settings.stripe_api_key is None:
            raise UsageError(
                "no key for the Stripe API: set LAKEHOUSE_STRIPE_API_KEY to a restricted key that may read (Stripe dashboard, "
                "API keys)"
            )
        key = settings.stripe_api_key.get_secret_value()
        self.account = account
        self.livemode = "_test_" not in key
        self.version = settings.stripe_api_version
        self.spent = Spent()
        self.budget = TokenBucket(settings.stripe_rate_limit * settings.stripe_rate_share)
        self._base = settings.stripe_api_base
        self._client = stripe.StripeClient(
            key,
            stripe_account=account,
            stripe_version=settings.stripe_api_version,
            base_addresses={"api": settings.stripe_api_base},
            max_network_retries=0,
            http_client=stripe.RequestsClient(timeout=timeout),
        )

    def pages(self, path: str, **parameters: Any) -> Iterator[Page]:
        """A list from its newest element on, page by page, however long it takes.

        The cursor is the id of the last element seen, so what comes to the top of the list meanwhile shifts nothing.

        Raises:
            Retryable: Stripe stays away. Terminal: Stripe refuses key or request.
        """
        cursor: dict[str, str] = {}
        while True:
            response = self._get(f"/v1/{path}", limit=PAGE, **parameters, **cursor)
            try:
                listed = _listed.decode(response.body)
                items = [Item(head.id, head.created, bytes(raw)) for raw in listed.data for head in (_head.decode(raw),)]
            except msgspec.MsgspecError as error:
                raise Terminal(f"GET /v1/{path}: what Stripe answered is not a list of objects with ids: {error}") from None
            yield Page(items, listed.has_more, answered_at(response))
            if not listed.has_more or not items:
                return
            cursor = {"starting_after": items[-1].id}

    def retrieve(self, path: str, object_id: str) -> tuple[bytes | None, int]:
        """One object as text (None: Stripe knows none of this id), and the response's `Date`."""
        try:
            response = self._get(f"/v1/{path}/{object_id}")
        except _NotFound as missing:
            return None, missing.at
        return response.body.encode(), answered_at(response)

    def now(self) -> int:
        """Stripe's clock (epoch seconds): what is compared is Stripe's, so its clock counts, not this machine's."""
        return next(self.pages("events")).at

    def _get(self, url: str, **parameters: Any) -> stripe.StripeResponse:
        failed = refused = 0
        while True:
            self.budget.take()
            self.spent.requests += 1
            try:
                return self._client.raw_request("get", url, **parameters)  # type: ignore[no-any-return]
            except stripe.RateLimitError as error:
                refused += 1
                self.spent.refused += 1
                if refused >= REFUSALS:
                    raise Retryable(
                        f"Stripe refused GET {url} {refused} times for its rate ({_reason(error)}); run it again later, or lower "
                        "LAKEHOUSE_STRIPE_RATE_SHARE"
                    ) from None
                self.budget.refused(retry_after(error.headers) or _backoff(refused))
            except stripe.AuthenticationError as error:
                raise Terminal(f"Stripe does not accept the key in LAKEHOUSE_STRIPE_API_KEY ({_reason(error)})") from None
            except stripe.PermissionError as error:
                raise Terminal(
                    f"the key in LAKEHOUSE_STRIPE_API_KEY may not GET {url} ({_reason(error)}); give the restricted key that "
                    "permission"
                ) from None
            except stripe.InvalidRequestError as error:
                if error.http_status == 404:
                    raise _NotFound(_date(error.headers)) from None
                raise Terminal(f"Stripe refused GET {url}: {error.user_message} ({_reason(error)})") from None
            except stripe.StripeError as error:  # no connection, a body that ended early, 5xx: ask again
                failed += 1
                self.spent.failed += 1
                if failed >= ATTEMPTS:
                    raise Retryable(
                        f"Stripe at {self._base} does not answer GET {url} ({_reason(error)}); run it again"
                    ) from None
                time.sleep(_backoff(failed))


class _NotFound(Exception):
    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.at = at


def answered_at(response: stripe.StripeResponse) -> int:
    """The response's `Date` as epoch seconds."""
    return _date(response.headers)


def _date(headers: Any) -> int:
    try:
        return int(email.utils.parsedate_to_datetime(headers["date"]).timestamp())
    except (KeyError, ValueError, TypeError):  # a proxy took it away: our own clock is the next best
        return int(time.time())


def retry_after(headers: Any) -> float | None:
    """The seconds that `Retry-After` asks for (RFC 9110: seconds, or a date), at most five minutes; None without it."""
    value = (headers or {}).get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_SECONDS)


def _backoff(attempt: int) -> float:
    return float(min(FIRST_WAIT_SECONDS * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS) * random.uniform(0.5, 1.0))  # noqa: S311


def _reason(error: stripe.StripeError) -> str:
    """What Stripe says of a failure without any value: status, limiter, request id."""
    headers = error.headers or {}
    told = [f"HTTP {error.http_status}" if error.http_status else type(error).__name__]
    told += [str(headers[name]) for name in ("stripe-rate-limited-reason", "request-id") if name in headers]
    return ", ".join(told)
