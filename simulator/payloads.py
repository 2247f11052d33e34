"""Product events as JSON bytes, made a slice at a time (400 MB of them would not fit beside a lakehouse in 2 GB).

The text is put together by Polars from columns and lookup tables, at about 3 us an event: no dict and no JSON encoder a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import polars as pl
import pyarrow as pa

from simulator.catalogue import FEATURES
from simulator.chance import base62, below, generator, hex_text, lookup, mixed, salt, uuid4, uuid_text
from simulator.identity import EVERYTHING, ONLY_DEVICE
from simulator.usage import EVENT_NAMES, MALFORMATIONS, Usage

SLICE = 20_000
_DAY_MS = 86_400_000
_BROWSERS = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) Chrome/{v}.0.0.0 Safari/537.36",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) Version/18.{w} Safari/605.1.15",
    "Mozilla/5.0 (X11; Linux x86_64; rv:{v}.0) Gecko/20100101 Firefox/{v}.0",
)
_APPS = ("StreamForge/{a} (iPhone; iOS 18.{w}; Scale/3.00)", "StreamForge/{a} (Linux; Android 15; SM-S92{w}B)")
_COUNTRIES = (
    ("US", "en-US"), ("US", "es-US"), ("GB", "en-GB"), ("DE", "de-DE"), ("FR", "fr-FR"), ("ES", "es-ES"),
    ("SE", "sv-SE"), ("BR", "pt-BR"), ("IN", "en-IN"), ("JP", "ja-JP"),
)  # fmt: skip
_RESOLUTIONS = ("480p", "720p", "720p", "1080p", "1080p", "1080p", "1440p", "2160p")
_POPS = ("ams1", "bom2", "dfw3", "fra2", "gru1", "iad4", "lhr2", "nrt1", "ord1", "par1", "sin2", "sjc5")
_PAGES = ("/library", "/library/recent", "/studio/editor", "/watch", "/analytics/overview", "/settings/brand", "/live")
# what is billed by use is summed up from these two
_MEASURES = {
    "duration_ms": pl.col("watched") + 900,
    "bytes": (pl.col("watched").cast(pl.UInt64) + 900) * 613 + below(pl.col("chance"), 99_991, 12),
}
_EXTRA = 512  # one in 100 of these carries fields that no schema knows
_NOT_JSON = (b"<html><body>502 Bad Gateway</body></html>", b"\xff\xfe\x00{\x80\x81not utf-8", b"upload failed: ENOSPC")


@dataclass(frozen=True)
class ProductRecords:
    """The records of the product topic, sorted by `received_at`. `len` counts them all, duplicates and malformed included."""

    usage: Usage
    workspace_ids: Sequence[str]
    seed: int

    def __len__(self) -> int:
        return self.usage.records.height

    @property
    def received_at(self) -> pl.Series:
        """Epoch milliseconds (Int64), ascending."""
        return self.usage.records["received_at"]

    def slices(self, from_ms: int | None = None, to_ms: int | None = None, rows: int = SLICE) -> Iterator[pa.Table]:
        """The records received in [from_ms, to_ms) as Arrow tables of at most `rows` rows, formatted as they are asked for.

        Columns: received_at (int64, epoch ms), key (large_binary: the workspace id, or that of the device where no workspace is
        named), payload (large_binary: JSON).
        """
        received = self.received_at
        first = 0 if from_ms is None else received.search_sorted(from_ms)
        last = len(self) if to_ms is None else received.search_sorted(to_ms)
        for offset in range(first, last, rows):
            yield self._format(self.usage.records.slice(offset, min(rows, last - offset)))

    def event_ids(self, numbers: pl.DataFrame) -> pl.Series:
        """The `event_id` of each row of a frame with an `event_no` column."""
        return numbers.select(uuid_text(self._hash("event/high"), self._hash("event/low"))).to_series()

    def measures(self, numbers: pl.DataFrame) -> pl.DataFrame:
        """The properties `duration_ms` and `bytes` (Int64) of each row of a frame with an `event_no` column."""
        chance = numbers.select(chance=self._hash("properties"))
        drawn = chance.with_columns(watched=_watched(pl.col("chance")))
        return drawn.select(**{name: measure.cast(pl.Int64) for name, measure in _MEASURES.items()})

    @property
    def user_ids(self) -> list[str]:
        """The id of each user, by its number."""
        return self._people[0]

    @property
    def anonymous_ids(self) -> list[str]:
        """The id of each device, by its number."""
        return self._people[1]

    def _hash(self, label: str) -> pl.Expr:
        return mixed(pl.col("event_no"), salt(self.seed, label))

    def _format(self, rows: pl.DataFrame) -> pa.Table:
        tables, device = self._tables, pl.col("device")
        # what an event does not say is the last entry of its table: nothing
        sent = pl.col("told") == EVERYTHING
        named = pl.when(sent).then("workspace").otherwise(len(self.workspace_ids))
        user = pl.when(pl.col("told") != ONLY_DEVICE).then("user").otherwise(len(self.user_ids))
        half_hour = device.cast(pl.UInt64) * 65_536 + (pl.col("occurred_at") // 1_800_000).cast(pl.UInt64)
        # Hashes first, as columns: an eager select would work out a repeated expression again each time.
        rows = rows.with_columns(
            high=self._hash("event/high"), low=self._hash("event/low"), chance=self._hash("properties"),
            more=self._hash("context"), trace=self._hash("trace"), session=mixed(half_hour, salt(self.seed, "session")),
        ).with_columns(
            video=mixed(pl.col("workspace") * 512 + below(pl.col("chance"), 97, 44), salt(self.seed, "video")),
            watched=_watched(pl.col("chance")),
        )  # fmt: skip
        chance, more = pl.col("chance"), pl.col("more")
        text = pl.concat_str(
            pl.lit('{"event_id":"'), uuid_text(pl.col("high"), pl.col("low")),
            pl.lit('","event_name":"'), lookup(tables["name"], pl.col("name").cast(pl.UInt32)),
            pl.lit('","schema_version":3,"occurred_at":"'), self._iso("occurred_at"),
            pl.lit('","sent_at":"'), self._iso("sent_at"),
            pl.lit('",'), lookup(tables["workspace"], named), lookup(tables["user"], user),
            pl.lit('"anonymous_id":"'), lookup(tables["anonymous"], device),
            pl.lit('","session_id":"ses_'), hex_text(pl.col("session")),
            pl.lit('",'), lookup(tables["feature"], pl.col("feature").cast(pl.UInt32).fill_null(len(FEATURES))),
            lookup(tables["device"], device),
            pl.lit(',"properties":{"video_id":"vid_'), hex_text(pl.col("video")),
            pl.lit('","duration_ms":'), _MEASURES["duration_ms"],
            pl.lit(',"bytes":'), _MEASURES["bytes"],
            pl.lit(',"bitrate_kbps":'), below(chance, 7600, 21) + 400,
            pl.lit(',"resolution":"'), lookup(tables["resolution"], below(chance, len(_RESOLUTIONS), 50)),
            pl.lit('","cdn_pop":"'), lookup(tables["pop"], below(more, len(_POPS), 17)),
            pl.lit('","success":'), lookup(tables["success"], below(more, 64, 5)),
            pl.lit('},"context":{'), lookup(tables["context"], device),
            pl.lit(',"page":"'), lookup(tables["page"], below(more, len(_PAGES), 29)),
            pl.lit('","trace_id":"'), hex_text(pl.col("trace")),
            pl.lit('"}'), lookup(tables["extra"], below(self._hash("extra"), _EXTRA)),
            pl.lit("}"),
        )  # fmt: skip
        made = rows.select(
            "received_at",
            key=pl.when(sent).then(lookup(tables["key"], named)).otherwise(lookup(tables["anonymous"], device)).cast(pl.Binary),
            payload=text.cast(pl.Binary),
        )
        bad = rows.with_row_index("row").filter(pl.col("malformation") > 0)
        if bad.height:
            replacement: list[bytes | None] = [None] * rows.height
            payloads = made["payload"]
            for row, kind, received, number in bad.select("row", "malformation", "received_at", "event_no").iter_rows():
                replacement[row] = malformed(payloads[row], MALFORMATIONS[kind], received, number)
            patch = pl.Series("patch", replacement, dtype=pl.Binary)
            made = made.with_columns(payload=pl.coalesce(patch, "payload"))
        return made.to_arrow(compat_level=pl.CompatLevel.oldest())

    def _iso(self, column: str) -> pl.Expr:
        tables, ms = self._tables, pl.col(column)
        in_day = ms % _DAY_MS
        return pl.concat_str(
            lookup(tables["day"], ms // _DAY_MS - self._first_day),
            lookup(tables["minute"], in_day // 60_000),
            lookup(tables["second"], in_day % 60_000),
        )

    @cached_property
    def _first_day(self) -> int:
        lowest: Any = self.usage.records["occurred_at"].min()
        return int(lowest) // _DAY_MS

    @cached_property
    def _people(self) -> tuple[list[str], list[str], list[str], list[str]]:
        return _devices(self.seed, self.usage.people.devices)

    @cached_property
    def _tables(self) -> dict[str, pl.Series]:
        highest: Any = self.usage.records["received_at"].max()
        days = range(self._first_day, int(highest) // _DAY_MS + 1)
        users, anonymous, device, context = self._people
        texts: dict[str, Sequence[str]] = {
            "name": EVENT_NAMES,
            "feature": [*(f'"feature":"{feature}",' for feature in FEATURES), ""],
            "workspace": [*(f'"workspace_id":"{w}",' for w in self.workspace_ids), ""],
            "key": [*self.workspace_ids, ""],
            "user": [*(f'"user_id":"{user}",' for user in users), ""],
            "anonymous": anonymous,
            "device": device,
            "context": context,
            "resolution": _RESOLUTIONS,
            "pop": _POPS,
            "page": _PAGES,
            "success": ["true"] * 62 + ["false"] * 2,
            "extra": _extras(self.seed),
            "day": [datetime.fromtimestamp(day * 86_400, UTC).strftime("%Y-%m-%dT") for day in days],
            "minute": [f"{hour:02d}:{minute:02d}:" for hour in range(24) for minute in range(60)],
            "second": [f"{ms // 1000:02d}.{ms % 1000:03d}Z" for ms in range(60_000)],
        }
        return {name: pl.Series(name, values, dtype=pl.String) for name, values in texts.items()}


def _watched(chance: pl.Expr) -> pl.Expr:
    """Milliseconds from 0 to half an hour."""
    return below(chance, 1_800_000, 7)


def _devices(seed: int, devices: int) -> tuple[list[str], list[str], list[str], list[str]]:
    """Ids of users and of devices, and the parts of the JSON that belong to a device. Two devices a user, the second a phone."""
    rng = generator(seed, "devices")
    users, anonymous, parts, contexts = [], [], [], []
    for number in range(devices):
        phone = number % 2 == 1
        if not phone:
            users.append(f"usr_{base62(rng, 16)}")
            country, locale = rng.choice(_COUNTRIES)
        version = f"5.{rng.randint(3, 19)}.{rng.randint(0, 9)}"
        kind = rng.choice(_APPS if phone else _BROWSERS)
        agent = kind.format(v=rng.randint(118, 139), w=rng.randint(0, 6), a=version)
        platform = "web" if not phone else "ios" if "iPhone" in agent else "android"
        network = rng.choice(("192.0.2", "198.51.100", "203.0.113"))
        address = f"{network}.{rng.randint(1, 254)}" if rng.random() < 0.7 else f"2001:db8:{rng.randrange(65536):x}::{number:x}"
        anonymous.append(uuid4(rng))
        parts.append(
            f'"platform":"{platform}","app_version":"{version}","country":"{country}","ip":"{address}","user_agent":"{agent}"'
        )
        link = rng.choice(("wifi", "5g", "4g")) if phone else rng.choice(("ethernet", "wifi"))
        contexts.append(f'"locale":"{locale}","network":"{link}","sdk":"{platform}/3.{rng.randint(0, 8)}.{rng.randint(0, 9)}"')
    return users, anonymous, parts, contexts


def _extras(seed: int) -> list[str]:
    rng = generator(seed, "extras")
    extras = [""] * _EXTRA
    for place in range(0, _EXTRA, 100):
        if rng.random() < 0.5:
            extras[place] = f',"experiment":{{"id":"exp_{rng.randint(10, 99)}","variant":"{rng.choice("AB")}"}}'
        else:
            extras[place] = f',"referrer":"https://news.example/{base62(rng, 8)}"'
    return extras


def malformed(payload: bytes, kind: str, received_ms: int, number: int) -> bytes:
    """A good payload made bad in one of the ways of `usage.MALFORMATIONS`."""
    if kind == "truncated":
        return payload[: 20 + number % (len(payload) - 40)]
    if kind == "not_json":
        return _NOT_JSON[number % len(_NOT_JSON)]
    event = json.loads(payload)
    moved = {"occurred_at_40_days_old": received_ms - 40 * _DAY_MS, "occurred_at_in_the_future": received_ms + _DAY_MS}
    if kind == "no_event_id":
        del event["event_id"]
    elif kind == "no_occurred_at":
        del event["occurred_at"]
    elif kind == "occurred_at_without_zone":
        event["occurred_at"] = event["occurred_at"].removesuffix("Z")
    elif kind == "occurred_at_garbage":
        event["occurred_at"] = "yesterday"
    elif kind in moved:
        moment = datetime.fromtimestamp(moved[kind] / 1000, UTC)
        event["occurred_at"] = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    elif kind == "workspace_id_number":
        event["workspace_id"] = number
    return json.dumps(event, separators=(",", ":")).encode()
