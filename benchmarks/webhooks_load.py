"""The load generator of the webhook benchmark, a process of its own: raw keep-alive connections, signed bodies of real shapes.

`python -m benchmarks.webhooks_load` reads a `Load` as JSON and prints its figures as JSON. What was answered 200 is written to a
file as one SHA-256 of the body a line.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from simulator.world import WorldConfig, build_world

CONNECTIONS, STEADY_RATE, BURST = 32, 150.0, 10
BODY_BYTES = 3_000


class Load(msgspec.Struct):
    """What to send where: seconds of each phase, and the file for what was answered."""

    url: str
    secret: str
    saturated: float
    steady: float
    burst: float
    answered: str

    def to_json(self) -> str:
        """For the other process."""
        return msgspec.json.encode(self).decode()


def bodies() -> Iterator[bytes]:
    """Bodies without end, each with an id of its own: events of a simulated world, cut or filled up to 3 KB on average."""
    world = build_world(WorldConfig(customers=100, days=20, product_events=1_000))
    events = [delivery.body for delivery in world.stripe_deliveries]
    mean = sum(map(len, events)) / len(events)
    fill = b'"pad":"' + b"x" * max(0, int(BODY_BYTES - mean)) + b'",'
    for number in itertools.count():
        event = events[number % len(events)]
        yield b'{"n":%d,' % number + fill + event[1:]


class Sender:
    """Posts over its connections and remembers how long each answer took."""

    def __init__(self, load: Load) -> None:
        host_port, _, path = load.url.removeprefix("http://").partition("/")
        self.host, _, port = host_port.partition(":")
        self.port, self.path, self.secret = int(port), f"/{path}", load.secret.encode()
        self.answered: set[str] = set()
        self.requests = self.refused = 0

    def request(self, body: bytes) -> bytes:
        """A signed request."""
        now = int(time.time())
        digest = hmac.new(self.secret, b"%d." % now + body, hashlib.sha256).hexdigest()
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json; charset=utf-8\r\n"
            f"User-Agent: Stripe/1.0 (+https://stripe.com/docs/webhooks)\r\nStripe-Signature: t={now},v1={digest}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One connection."""
        return await asyncio.open_connection(self.host, self.port)

    async def post(self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], body: bytes) -> None:
        """Send one and read its answer."""
        reader, writer = connection
        writer.write(self.request(body))
        answer = await reader.readuntil(b"\r\n\r\n")
        if answer.startswith(b"HTTP/1.1 200"):
            self.requests += 1
            self.answered.add(hashlib.sha256(body).hexdigest())
            return
        self.refused += 1
        writer.close()
        raise ConnectionError(answer[:40])

    async def saturate(self, source: Iterator[bytes], seconds: float) -> tuple[float, list[float]]:
        """As fast as the connections go: (requests a second, seconds each)."""
        took: list[float] = []
        end = time.perf_counter() + seconds

        async def one() -> None:
            connection = await self.connect()
            while (started := time.perf_counter()) < end:
                await self.post(connection, next(source))
                took.append(time.perf_counter() - started)
            connection[1].close()

        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
        return len(took) / (time.perf_counter() - started), took

    async def offer(self, source: Iterator[bytes], rate: float, seconds: float) -> list[float]:
        """`rate` requests a second whatever the answers do; seconds from when each was due to its answer."""
        took: list[float] = []
        free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        for _ in range(CONNECTIONS * 4):
            free.put_nowait(await self.connect())

        async def one(due: float, body: bytes) -> None:
            connection = await free.get()
            await self.post(connection, body)
            took.append(time.perf_counter() - due)
            free.put_nowait(connection)

        started, tasks = time.perf_counter(), []
        for number in range(int(rate * seconds)):
            due = started + number / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(due, next(source))))
        await asyncio.gather(*tasks)
        while not free.empty():
            free.get_nowait()[1].close()
        return took


def percentile(values: list[float], share: float) -> float:
    """In milliseconds."""
    return round(sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1000, 2)


async def run(load: Load) -> dict[str, float]:
    """All three phases."""
    sender, source = Sender(load), bodies()
    rate, saturated = await sender.saturate(source, load.saturated)
    steady = await sender.offer(source, STEADY_RATE, load.steady)
    repeated = itertools.cycle([next(source) for _ in range(int(STEADY_RATE * load.burst))])
    burst = await sender.offer(repeated, STEADY_RATE * BURST, load.burst)
    Path(load.answered).write_text("\n".join(sender.answered))
    return {
        "requests_per_second": round(rate, 1),
        **{f"p{n}_ms": percentile(saturated, n / 100) for n in (50, 95, 99)},
        "steady_p99_ms": percentile(steady, 0.99),
        **{f"burst_p{n}_ms": percentile(burst, n / 100) for n in (50, 95, 99)},
        "requests": sender.requests,
        "refused": sender.refused,
    }


if __name__ == "__main__":
    figures = asyncio.run(run(msgspec.json.decode(sys.stdin.read(), type=Load)))
    sys.stdout.write(msgspec.json.encode(figures).decode())
