"""Who is where: users of workspaces, some of whom move or visit another one, and devices, some of which are shared.

Not every event says all of it. What it leaves out is told apart by the rules of docs/product-events.md, worked out here from the
world's own state by plain search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import polars as pl

from simulator.search import begun, row_of
from simulator.workspaces import BETWEEN_CHANGES, DAY, Workspace

# What an event says of whose it is. An identify event names the device and its user, and no workspace.
EVERYTHING, NO_WORKSPACE, ONLY_DEVICE, IDENTIFY = range(4)
SHARES = ((IDENTIFY, 0.01), (NO_WORKSPACE, 0.04), (ONLY_DEVICE, 0.03))
GUESTS, MOVERS = 0.03, 0.04  # of all users
SHARED_DEVICES = 0.03
PAUSES = 0.3  # of those who move: some days in which they belong to no workspace
LOOKBACK_MS = 30 * DAY * 1000


@dataclass(frozen=True, slots=True)
class Stay:
    """A user (its number) belongs to a workspace (its place in the world's list) over [start, end) epoch seconds, None: still."""

    user: int
    workspace: int
    role: str
    start: int
    end: int | None


@dataclass(frozen=True, slots=True)
class People:
    """The users, numbered through workspace by workspace; user n has the devices 2n and 2n + 1.

    first_user: of each workspace, and behind the last one the number of all. stays: of every user; one at home, cut short by a
    move to another workspace, or with a visit to another one beside it. partners: the second user of a device that is shared.
    """

    first_user: tuple[int, ...]
    stays: tuple[Stay, ...]
    partners: dict[int, int]

    @property
    def devices(self) -> int:
        """How many there are."""
        return 2 * self.first_user[-1]


def make_people(rng: Random, workspaces: Sequence[Workspace], horizon: int) -> People:
    """A dozen users and more for each workspace, who belong to it from its creation to its closing, or until they move."""
    first = [0]
    for _ in workspaces:
        first.append(first[-1] + 12 + int(rng.lognormvariate(2.0, 0.7)))
    home = [w for w, (start, end) in enumerate(pairwise(first)) for _ in range(start, end)]
    everyone = len(home)
    chosen = rng.sample(range(everyone), max(2, round(everyone * (GUESTS + MOVERS))))
    guests = set(chosen[: max(1, round(everyone * GUESTS))])
    restless = set(chosen)
    stays = []
    for user, place in enumerate(home):
        number, space = user - first[place], workspaces[place]
        role = "owner" if number == 0 else "admin" if number < 3 else "member"
        away = _elsewhere(rng, workspaces, place, horizon, user) if user in restless else None
        end = space.closed
        if away is not None and user in guests:
            until = min(away.start + rng.randint(BETWEEN_CHANGES, 3 * BETWEEN_CHANGES), horizon - 1)
            away = Stay(user, away.workspace, "guest", away.start, until)
        elif away is not None:
            end = away.start
            if rng.random() < PAUSES:
                away = Stay(user, away.workspace, "member", min(end + rng.randint(DAY, 3 * DAY), horizon - 1), None)
        stays.append(Stay(user, place, role, space.created, end))
        stays += [away] if away is not None else []
    shared = rng.sample(range(2 * everyone), round(2 * everyone * SHARED_DEVICES))
    return People(tuple(first), tuple(stays), {device: rng.randrange(everyone) for device in shared})


def _elsewhere(rng: Random, workspaces: Sequence[Workspace], home: int, horizon: int, user: int) -> Stay | None:
    """A stay in another workspace, begun when both have been there for days, and neither will be closed; None if it cannot be."""
    host = rng.randrange(len(workspaces))
    earliest = max(workspaces[home].created, workspaces[host].created) + BETWEEN_CHANGES
    latest = horizon - BETWEEN_CHANGES - DAY
    if host == home or earliest >= latest or any(workspaces[w].closed is not None for w in (home, host)):
        return None
    return Stay(user, host, "member", rng.randint(earliest, latest), None)


def moves(people: People) -> pl.DataFrame:
    """Of each user who moved: user, left_ms, joined_ms (epoch), moved_to (place of the workspace)."""
    leaving = {s.user: s.end for s in people.stays if s.end is not None and s.role != "guest"}
    rows = [
        (s.user, leaving[s.user] * 1000, s.start * 1000, s.workspace)
        for before, s in pairwise(people.stays)
        if before.user == s.user and s.role != "guest"
    ]
    schema = {"user": pl.Int64, "left_ms": pl.Int64, "joined_ms": pl.Int64, "moved_to": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def placed(events: pl.DataFrame, records: pl.DataFrame, people: People) -> pl.DataFrame:
    """Unique valid events with where they count, in the same order.

    events, records: see `usage.Usage`. `workspace` becomes that of the event as sent, else the only one that its user belonged
    to, else NULL. Added: `source` (sent, membership, identity, NULL), `identified` (the user found by the device alone) and
    `several`: the user belonged to more than one workspace.
    """
    numbered = events.with_row_index("row")
    unplaced = numbered.filter(pl.col("told") != EVERYTHING).select("row", "occurred_at", "device", "user", "told")
    alone = pl.col("told") == ONLY_DEVICE
    found = unplaced.with_columns(identified=_identified(unplaced, records)).with_columns(
        identified=pl.when(alone).then("identified"), who=pl.when(alone).then("identified").otherwise("user")
    )
    forever = 1 << 41
    spans = [(s.user, s.workspace, s.start * 1000, s.end * 1000 if s.end else forever) for s in people.stays]
    schema = {"who": pl.UInt32, "there": pl.UInt32, "start": pl.Int64, "end": pl.Int64}
    there = (
        found.join(pl.DataFrame(spans, schema=schema, orient="row"), on="who")
        .filter(pl.col("start") <= pl.col("occurred_at"), pl.col("occurred_at") < pl.col("end"))
        .group_by("row")
        .agg(pl.col("there").n_unique().alias("places"), pl.col("there").first())
    )
    one = pl.col("places") == 1
    way = pl.when(alone).then(pl.lit("identity")).otherwise(pl.lit("membership"))
    learnt = found.join(there, on="row", how="left").select(
        "row",
        "identified",
        found=pl.when(one).then("there"),
        way=pl.when(one).then(way),
        several=(pl.col("places") > 1).fill_null(value=False),
    )
    sent = pl.col("told") == EVERYTHING
    return (
        numbered.join(learnt, on="row", how="left", maintain_order="left")
        .with_columns(
            workspace=pl.when(sent).then("workspace").otherwise("found"),
            source=pl.when(sent).then(pl.lit("sent")).otherwise("way"),
            several=pl.col("several").fill_null(value=False),
        )
        .drop("row", "found", "way")
    )


def _identified(events: pl.DataFrame, records: pl.DataFrame) -> pl.Series:
    """The user that the device of each event is known to be then: by the last identify event, else by the first, 30 days back.

    Of two of one device and millisecond the one received first counts.
    """
    said = (
        records.filter(pl.col("told") == IDENTIFY, pl.col("malformation") == 0)
        .sort("received_at", "event_no")
        .unique(["device", "occurred_at"], keep="first", maintain_order=True)
        .sort("device", "occurred_at")
        .select("device", "occurred_at", "user")
    )
    if said.is_empty():
        return pl.Series([None] * events.height, dtype=pl.UInt32)
    device = events["device"]
    after = begun(said, "device", "occurred_at", device, events["occurred_at"])
    last, before = row_of(said, "device", device, after - 1)
    first, later = row_of(said, "device", device, after)
    soon = later & (first["occurred_at"] - LOOKBACK_MS <= events["occurred_at"])
    told = pl.DataFrame({"before": before, "soon": soon, "last": last["user"], "first": first["user"]})
    return told.select(pl.when("before").then("last").when("soon").then("first")).to_series()
