"""Twenty thousand requests, good, damaged or hostile, over sockets: an answer each, and the topic holds exactly the good ones.

The oracle knows of each request whether its body is what was signed; it shares no code with the receiver.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from test_webhooks import NOW, Receiver, read_all, receiver

from lakehouse.broker import EmbeddedBroker

REQUESTS, WIRES = 20_000, 24
SECRETS = (b"whsec_new", b"whsec_old")


@dataclass
class Case:
    """What is sent, the statuses that may come back (in order, one a request), and the bodies that a 200 stands for."""

    kind: str
    wire: bytes
    expected: list[set[int]]
    bodies: list[bytes] = field(default_factory=list)
    ends: bool = False  # the server may close the connection


def event(dice: random.Random, number: int) -> bytes:
    fields = {
        "id": f"evt_{number}",
        "object": "event",
        "account": dice.choice([None, "acct_1", "acct_é"]),
        "data": {
            "object": {
                "id": f"sub_{dice.randrange(50)}",
                "note": dice.choice(["", "ünïcödé", '"quoted" \\', "x" * dice.randrange(3000)]),
            }
        },
    }
    return json.dumps(fields, ensure_ascii=dice.random() < 0.5, indent=dice.choice([None, 2])).encode()


def signed(body: bytes, secret: bytes = SECRETS[0], at: int = int(NOW)) -> bytes:
    return b"t=%d,v1=" % at + hmac.new(secret, b"%d." % at + body, hashlib.sha256).hexdigest().encode()


def request(
    body: bytes, signature: bytes | None = None, *more: bytes, path: bytes = b"/webhooks/stripe", method: bytes = b"POST"
) -> bytes:
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body)]
    lines.append(b"Stripe-Signature: " + (signed(body) if signature is None else signature))
    return b"\r\n".join([*lines, *more]) + b"\r\n\r\n" + body


def damaged(dice: random.Random, data: bytes) -> bytes:
    """A few bytes changed, taken out, put in or cut off."""
    out = bytearray(data)
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(out) + 1)
        match dice.randrange(5):
            case 0:
                out[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                del out[at : at + dice.randint(1, 20)]
            case 2:
                out[at:at] = dice.choice([b"\0", b"\r\n", b"\xff", b"}", b" ", b"\xed\xa0\x80"])
            case 3:
                del out[at:]
            case 4:
                out[at : at + 1] = bytes([out[at] ^ 1 << dice.randrange(8)]) if at < len(out) else b"x"
    return bytes(out)


def is_object(body: bytes) -> bool:
    """Strict JSON (no NaN), UTF-8, an object, not deeper than what any parser takes."""

    def refuse(_: str) -> None:
        raise ValueError

    try:
        return isinstance(json.loads(body.decode("utf-8"), parse_constant=refuse), dict)
    except (ValueError, RecursionError):
        return False


def says(header: bytes, body: bytes) -> bool:
    """Whether a signature header, as sent, signs the body: written from Stripe's page, not from the receiver."""
    times, ok = [], False
    for item in header.decode("latin-1").split(","):
        name, _, value = item.strip(" \t").partition("=")
        times += [value] if name == "t" else []
    if len(times) != 1 or not (times[0].isascii() and times[0].isdigit() and len(times[0]) <= 12):
        return False
    for item in header.decode("latin-1").split(","):
        name, _, value = item.strip(" \t").partition("=")
        digests = [hmac.new(s, f"{times[0]}.".encode() + body, hashlib.sha256).hexdigest() for s in SECRETS]
        ok |= name == "v1" and value in digests
    return ok and abs(NOW - int(times[0])) <= 300


# Each kind of case, and how often it comes


def good(dice: random.Random, body: bytes) -> Case:
    kind = dice.choice([b"application/json", b"text/plain", b"multipart/form-data; boundary=x", b"\xff", b""])
    wire = request(body, signed(body, dice.choice(SECRETS), int(NOW) + dice.randint(-299, 300)), b"Content-Type: " + kind)
    return Case("good", wire, [{200}], [body])


def body_changed(dice: random.Random, body: bytes) -> Case:
    other = damaged(dice, body)
    ok = other == body
    return Case("body changed after signing", request(other, signed(body)), [{200} if ok else {400}], [body] if ok else [])


def signed_nonsense(dice: random.Random, body: bytes) -> Case:
    odd = [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a":NaN}',
        b'{"a":1}{}',
        b"\xef\xbb\xbf" + body,
        body.decode().encode("utf-16"),
        b'{"\xff":1}',
        b"[" * 50_000,
    ]
    other = damaged(dice, body) if dice.random() < 0.7 else dice.choice(odd)
    ok = is_object(other)
    return Case("nonsense, signed", request(other), [{200} if ok else {400}], [other] if ok else [])


def signature_changed(dice: random.Random, body: bytes) -> Case:
    header = signed(body, dice.choice([*SECRETS, b"whsec_other"]), int(NOW) + dice.choice([0, 0, -299, 299, -302, 302, -(10**9)]))
    time, _, v1 = header.partition(b",")
    match dice.randrange(8):
        case 0:
            header = b"v0=00," + header + b",v1=00,v2=x"
        case 1:
            header = time + b", " + v1 + b" ,v1=" + b"0" * 64
        case 2:
            header = time + b"," + v1.upper()
        case 3:
            header = header + b"," + time
        case 4:
            header = v1
        case 5:
            header = time.replace(b"t=", b"t=0") + b"," + v1
        case 6:
            header = bytes(b for b in damaged(dice, header) if 0x20 <= b != 0x7F)
    ok = says(header, body)
    return Case("signature changed", request(body, header), [{200} if ok else {400}], [body] if ok else [])


def two_signatures(dice: random.Random, body: bytes) -> Case:
    return Case("two signature headers", request(body, None, b"Stripe-Signature: " + signed(body)), [{400}])


def chunked(dice: random.Random, body: bytes) -> Case:
    cuts = sorted({0, len(body), *(dice.randrange(len(body)) for _ in range(dice.randint(0, 5)))})
    parts = [body[a:b] for a, b in pairwise(cuts)]
    sent = b"".join(b"%x%s\r\n%s\r\n" % (len(p), dice.choice([b"", b";a=b"]), p) for p in parts)
    lines = [b"POST /webhooks/stripe HTTP/1.1", b"Host: x", b"Transfer-Encoding: chunked", b"Stripe-Signature: " + signed(body)]
    return Case("chunked", b"\r\n".join(lines) + b"\r\n\r\n" + sent + b"0\r\n\r\n", [{200}], [body])


def pipelined(dice: random.Random, body: bytes) -> Case:
    bodies = [body[:-1] + b',"n":%d}' % n for n in range(dice.randint(2, 4))]
    return Case("pipelined", b"".join(map(request, bodies)), [{200}] * len(bodies), bodies)


def elsewhere(dice: random.Random, body: bytes) -> Case:
    path = dice.choice(
        [b"/", b"/webhooks/stripe/", b"/webhooks/stripe%00", b"//webhooks/stripe", b"/metrics/../webhooks/stripe", b"/%2e%2e"]
    )
    if dice.random() < 0.5:
        return Case("another path", request(body, path=path), [{404, 307}])
    return Case("another method", request(body, method=dice.choice([b"PUT", b"GET", b"DELETE", b"PATCH", b"OPTIONS"])), [{405}])


def bad_http(dice: random.Random, body: bytes) -> Case:
    good = request(body)
    length = b"Content-Length: %d" % len(body)
    wrong = [
        good.replace(length, length + b"\r\n" + b"Content-Length: %d" % (len(body) + 1)),
        good.replace(length, length + b"\r\nTransfer-Encoding: chunked"),
        good.replace(length, b"Content-Length: -1"),
        good.replace(length, b"Content-Length: ten"),
        good.replace(length, b"Content-Length: 99999999999999999999999"),
        good.replace(b"Host: x", b"Host: x\0"),
        good.replace(b"Host: x", b"Ho st: x"),
        good.replace(b"HTTP/1.1", b"HTTP/9.9"),
        good.replace(b"POST /webhooks/stripe", b"POST /webhooks/\xff"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00" + bytes(dice.randrange(256) for _ in range(64)),  # a TLS hello
        b"GET\r\n\r\n",
        bytes(dice.randrange(256) for _ in range(40)) + b"\r\n\r\n",
    ]  # fmt: skip
    return Case("no HTTP", dice.choice(wrong), [{400}], ends=True)


def too_much(dice: random.Random, body: bytes) -> Case:
    match dice.randrange(4):
        case 0:
            return Case("too large", request(body).replace(b"Content-Length: ", b"Content-Length: 9"), [{413, 408}], ends=True)
        case 1:
            return Case("huge header", request(body, None, b"X-Pad: " + b"x" * 40_000), [{431}], ends=True)
        case 2:
            return Case("many headers", request(body, None, *(b"X-%d: 1" % n for n in range(6_000))), [{431}], ends=True)
        case _:
            return Case("long path", request(body, path=b"/" + b"p" * 40_000), [{431}], ends=True)


def anything(dice: random.Random, body: bytes) -> Case:
    """Damage anywhere in the request: what comes back is an answer or the end, and a 200 only for the body that was signed."""
    wire = damaged(dice, request(body))
    return Case("damage anywhere", wire, [{200, 400, 404, 405, 408, 413, 431}], [body], ends=True)


KINDS: list[tuple[int, Callable[[random.Random, bytes], Case]]] = [
    (25, good), (20, body_changed), (15, signed_nonsense), (15, signature_changed), (2, two_signatures), (6, chunked),
    (4, pipelined), (4, elsewhere), (4, bad_http), (1, too_much), (6, anything),
]  # fmt: skip


class Wire:
    """One client connection, opened again whenever it was closed."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.address = (host, int(port))
        self.socket: socket.socket | None = None
        self.rest = b""

    def send(self, data: bytes) -> None:
        if self.socket is None:
            self.socket, self.rest = socket.create_connection(self.address, timeout=20), b""
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent: the answer is there all the same
            self.socket.sendall(data)

    def hang_up(self, *, writing: bool = False) -> None:
        if self.socket is not None and writing:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
        elif self.socket is not None:
            self.socket.close()
            self.socket = None

    def more(self) -> bool:
        assert self.socket is not None
        try:
            got = self.socket.recv(65_536)
        except ConnectionError:
            got = b""
        self.rest += got
        return bool(got)

    def answer(self) -> int | None:
        """The status of the next answer; None if the connection ended without one."""
        while b"\r\n\r\n" not in self.rest:
            if not self.more():
                assert not self.rest, self.rest
                self.hang_up()
                return None
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        assert b"Traceback" not in head
        length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
        while len(self.rest) < length and self.more():
            pass
        assert b"Traceback" not in self.rest[:length]
        self.rest = self.rest[length:]
        if b"connection: close" in head.lower():
            self.hang_up()
        return int(head.split(b" ")[1])


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    with EmbeddedBroker(tmp_path_factory.mktemp("broker")) as broker, receiver(broker, read_timeout=1.0) as running:
        yield running


def test_twenty_thousand_requests(up: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "writers")
    caplog.set_level(logging.WARNING, "uvicorn")
    dice = random.Random(20_260_101)
    wires = [Wire(up.url) for _ in range(WIRES)]
    weights, makers = zip(*KINDS, strict=True)
    accepted: Counter[bytes] = Counter()
    maybe: set[bytes] = set()  # the connection ended without an answer
    seen: Counter[tuple[str, int | None]] = Counter()
    sent = 0
    while sent < REQUESTS:
        turn = [dice.choices(makers, weights)[0](dice, event(dice, sent + n)) for n in range(WIRES)]
        for wire, case in zip(wires, turn, strict=True):
            wire.send(case.wire)
            if case.kind == "damage anywhere":  # it may have become half a request
                wire.hang_up(writing=True)
        for wire, case in zip(wires, turn, strict=True):
            sent += len(case.expected)
            for n, allowed in enumerate(case.expected):
                status = wire.answer()
                seen[case.kind, status] += 1
                assert status in allowed or (status is None and case.ends), (case.kind, status, case.wire[:3000])
                if status == 200:
                    accepted[case.bodies[n]] += 1
                elif status is None:
                    maybe.update(case.bodies)
            if case.ends:
                wire.hang_up()
    kept = Counter(r.value() or b"" for r in read_all(up.broker.bootstrap_servers))
    assert accepted - kept == Counter(), "answered 200, and not in the topic"
    assert set(kept - accepted) <= maybe, f"in the topic, and not answered 200: {set(kept - accepted) - maybe}"
    assert sum(accepted.values()) > REQUESTS / 4
    assert {kind for kind, _ in seen} >= {
        "good",
        "nonsense, signed",
        "chunked",
        "pipelined",
        "no HTTP",
        "huge header",
        "damage anywhere",
    }
    assert up.count("accepted") >= sum(accepted.values())
    assert up.count("failed") == 0
    assert not caplog.records, caplog.text
    assert up.client.get("/healthz").status_code == up.client.get("/readyz").status_code == 200
