"""A Stripe-shaped API over the simulated world: lists, pages, filters, keys, rate limits, and failures on request.

What it answers follows https://docs.stripe.com/api: list objects with `has_more`, cursors by id, the error object, `Request-Id`,
`Stripe-Version` and `Date` (simulated) headers, 429 with `Retry-After`. Faults are seeded, or scripted request by request.
"""

from __future__ import annotations

import asyncio
import email.utils
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from simulator.account import Account, Found
from simulator.chance import base62, generator
from simulator.shapes import Json

PATHS = {
    "balance_transactions": "balance_transaction",
    "charges": "charge",
    "credit_notes": "credit_note",
    "customers": "customer",
    "disputes": "dispute",
    "invoice_payments": "invoice_payment",
    "invoices": "invoice",
    "payment_intents": "payment_intent",
    "payment_methods": "payment_method",
    "prices": "price",
    "products": "product",
    "refunds": "refund",
    "subscriptions": "subscription",
}
FILTERS = ("customer", "charge", "payment_intent", "subscription", "product", "invoice", "active")
_CREATED = {"gt": int.__gt__, "gte": int.__ge__, "lt": int.__lt__, "lte": int.__le__}


@dataclass
class Faults:
    """What goes wrong. Shares are of requests, seeded; `script` says it of the next requests, one by one.

    rate_per_second: more are refused (429), each with `Retry-After: retry_after` unless that is None. drop: the connection ends
    in the middle of the body. fail: 500. delay: seconds before each answer. script: `ok`, `drop`, `fail`, `429`, `429:SECONDS`.
    """

    rate_per_second: float | None = None
    retry_after: float | None = 1.0
    drop: float = 0.0
    fail: float = 0.0
    delay: float = 0.0
    script: deque[str] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that came in: when (monotonic), its path with the query, and the status that was answered (0: dropped)."""

    at: float
    path: str
    status: int


class ApiError(Exception):
    """An answer that is Stripe's error object."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", **fields: str) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": {"message": message, "type": kind, **fields}}


class StripeApi:
    """Serves accounts over HTTP from a thread of its own; use it as a context manager.

    accounts: by id; None is the account that the keys belong to, others are asked for by `Stripe-Account`. clock: epoch seconds
    of simulated time. keys: the API keys that are let in; `_test_` keys see test mode only. before_answer: called with the path
    of each request, so that a test can let something happen between two pages.
    """

    def __init__(
        self,
        accounts: Mapping[str | None, Account],
        clock: Callable[[], float],
        keys: Sequence[str],
        faults: Faults | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        seed: int = 7,
        before_answer: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._accounts, self._clock, self._keys = accounts, clock, set(keys)
        self.faults = faults or Faults()
        self.seen: list[Seen] = []
        self._rng = generator(seed, "api")
        self._admitted: deque[float] = deque()
        self._host, self._port, self._before = host, port, before_answer
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """`http://host:port`."""
        return f"http://{self._host}:{self._port}"

    def __enter__(self) -> StripeApi:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self._host, self._port))
        self._port = listener.getsockname()[1]
        app = Starlette(routes=[Route("/v1/{path:path}", self._endpoint)])
        config = uvicorn.Config(
            app, ws="none", lifespan="off", access_log=False, log_config=None, log_level="critical", date_header=False
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="stripe-api", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError(f"the simulated Stripe API ended while starting on {self.url}")
            time.sleep(0.005)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(10)

    async def _endpoint(self, request: Request) -> Response:
        self._before(request.url.path)
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        fault = self._fault()
        if self.faults.delay:
            await asyncio.sleep(self.faults.delay)
        headers = {"Request-Id": f"req_{base62(self._rng, 14)}", "Date": email.utils.formatdate(self._clock(), usegmt=True)}
        try:
            if fault.startswith("429"):
                _, _, wait = fault.partition(":")
                headers |= {"Retry-After": wait} if wait else {}
                headers["Stripe-Rate-Limited-Reason"] = "endpoint-rate"
                raise ApiError(429, "Request rate limit exceeded.", code="rate_limit")
            if fault == "fail":
                raise ApiError(500, "An unknown error occurred.", "api_error")
            status, body = 200, self._answer(request, headers)
        except ApiError as error:
            status, body = error.status, error.body
        self.seen.append(Seen(time.monotonic(), path, 0 if fault == "drop" else status))
        content = msgspec.json.encode(body)
        response = Response(content, status, headers, "application/json")
        return Cut(content, headers) if fault == "drop" else response

    def _fault(self) -> str:
        """What goes wrong with this request; `ok` if nothing does."""
        if self.faults.script:
            return self.faults.script.popleft()
        now, rate = time.monotonic(), self.faults.rate_per_second
        if rate is not None:
            while self._admitted and self._admitted[0] <= now - 1.0:
                self._admitted.popleft()
            if len(self._admitted) >= rate:
                return "429" if self.faults.retry_after is None else f"429:{self.faults.retry_after:g}"
            self._admitted.append(now)
        chance = self._rng.random()
        return "drop" if chance < self.faults.drop else "fail" if chance < self.faults.drop + self.faults.fail else "ok"

    def _answer(self, request: Request, headers: dict[str, str]) -> Json:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or key not in self._keys:
            raise ApiError(401, f"Invalid API Key provided: {key[:8]}{'*' * 8}")
        account = self._accounts.get(request.headers.get("stripe-account"))
        if account is None:
            raise ApiError(403, "The provided key does not have access to this account.", code="account_invalid")
        if request.method != "GET":
            raise ApiError(405, "This API is read only.")
        version = request.headers.get("stripe-version")
        headers |= {"Stripe-Version": version} if version else {}
        now, livemode = self._clock(), "_test_" not in key
        parts = request.path_params["path"].split("/")
        query = dict(request.query_params.multi_items())
        if parts == ["events"]:
            kinds = [v for k, v in request.query_params.multi_items() if k == "type" or k.startswith("types")]
            known = ("type", *(k for k in query if k.startswith("types")))
            return _listed(list(account.events(now, livemode, kinds)), query, "event", "/v1/events", known)
        if parts[0] == "events" and len(parts) == 2:
            return _or_missing(account.event(parts[1], now, livemode), "event", parts[1])
        kind = PATHS.get(parts[0])
        if kind is None or len(parts) > 2:
            raise ApiError(404, f"Unrecognized request URL (GET: {request.url.path}).")
        if len(parts) == 2:
            return _or_missing(account.retrieve(kind, parts[1], now, livemode, version), kind, parts[1])
        found = account.objects(kind, now, livemode, version)
        status = query.pop("status", None)
        if kind == "subscription" and status is None:  # Stripe's default leaves the canceled ones out
            found = [f for f in found if f.body["status"] != "canceled"]
        elif status not in (None, "all"):
            found = [f for f in found if f.body.get("status") == status]
        for name in FILTERS:
            if name in query:
                found = [f for f in found if str(f.body.get(name)).lower() == query[name].lower()]
        return _listed(found, query, kind, f"/v1/{parts[0]}", FILTERS)


class Cut(Response):
    """A body that ends in the middle: the connection is closed before `Content-Length` is reached."""

    def __init__(self, content: bytes, headers: Mapping[str, str]) -> None:
        super().__init__(content, 200, headers, "application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Half of it."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": bytes(self.body)[: len(self.body) // 2]})


def _or_missing(body: Json | None, kind: str, wanted: str) -> Json:
    if body is None:
        raise ApiError(404, f"No such {kind}: '{wanted}'", code="resource_missing", param="id")
    return body


def _listed(found: list[Found], query: Mapping[str, str], kind: str, url: str, known: Sequence[str]) -> Json:
    """A page of a list, newest first, as the list object: cursors by id, `created` filters, `limit` 1 to 100."""
    for name in query:
        if name not in ("limit", "starting_after", "ending_before", "created", *known) and not name.startswith("created["):
            raise ApiError(400, f"Received unknown parameter: {name}", code="parameter_unknown", param=name)
    limit = _integer(query.get("limit", "10"), "limit")
    if not 1 <= limit <= 100:
        raise ApiError(400, "This value must be between 1 and 100.", param="limit")
    # Cursors name a place in the whole list, before any filter: the object need not match the filter of this request
    place = {f.id: f.place for f in found}
    matching = [f for f in found if _created_in(f, query)]
    for cursor in ("starting_after", "ending_before"):
        if cursor in query and query[cursor] not in place:
            raise ApiError(400, f"No such {kind}: '{query[cursor]}'", code="resource_missing", param=cursor)
    if "starting_after" in query and "ending_before" in query:
        raise ApiError(400, "You cannot use both `starting_after` and `ending_before`.")
    if "ending_before" in query:
        before = [f for f in matching if f.place > place[query["ending_before"]]]
        page, more = before[-limit:], len(before) > limit
    else:
        if "starting_after" in query:
            matching = [f for f in matching if f.place < place[query["starting_after"]]]
        page, more = matching[:limit], len(matching) > limit
    return {"object": "list", "data": [f.body for f in page], "has_more": more, "url": url}


def _created_in(found: Found, query: Mapping[str, str]) -> bool:
    created = int(found.body.get("created") or 0)
    if "created" in query and created != _integer(query["created"], "created"):
        return False
    return all(
        test(created, _integer(query[f"created[{name}]"], f"created[{name}]"))
        for name, test in _CREATED.items()
        if f"created[{name}]" in query
    )


def _integer(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ApiError(400, f"Invalid integer: {text}", code="parameter_invalid_integer", param=name) from None
