"""Workspaces and the CRM's knowledge of whose they are and who is in them: late, sometimes moved, never entered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random

from simulator.chance import base62
from simulator.state import Customer

HOUR, DAY = 3_600, 86_400
ENTERED_LATE = 0.15
# A poller that reads the present state once a day (or each round of the demo) must see every change.
BETWEEN_CHANGES = 5 * DAY
GUESTS = 0.02  # of the users of another workspace's customer


@dataclass(slots=True)
class Workspace:
    """A workspace. `owners`: (since epoch seconds, Stripe customer id), in order; `mapped`: the CRM knows it."""

    id: str
    created: int
    owners: list[tuple[int, str]]
    closed: int | None = None
    mapped: bool = True
    entered: datetime = field(default=datetime.min.replace(tzinfo=UTC))


@dataclass(frozen=True, slots=True)
class CrmChange:
    """A row of the CRM as it becomes visible. `effective_at`: since when the mapping (or the deletion) holds."""

    visible_at: datetime
    workspace_id: str
    stripe_customer_id: str
    effective_at: datetime
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class MembershipChange:
    """A row of the CRM's `memberships` as it becomes visible. `effective_at`: since when it holds (or ended)."""

    visible_at: datetime
    user_id: str
    workspace_id: str
    role: str
    effective_at: datetime
    deleted: bool = False


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _entered(rng: Random, effective: int) -> datetime:
    late = rng.random() < ENTERED_LATE
    wait = rng.randint(HOUR, 3 * DAY - 1) if late else rng.randint(2, 300)
    return _moment(effective + wait) + timedelta(microseconds=rng.randrange(1_000_000))


def make_workspaces(rng: Random, customers: Sequence[Customer], horizon: int) -> tuple[list[Workspace], list[CrmChange]]:
    """Each customer's 1 to 3 workspaces, and the CRM's changes sorted by when they become visible (see `CrmChange`)."""
    workspaces = []
    for customer in customers:
        for _ in range(rng.choices((1, 2, 3), (60, 28, 12))[0]):
            created = customer.created + rng.randint(30, 1800)
            workspaces.append(Workspace(f"ws_{base62(rng, 14)}", created, [(created, customer.id)]))
    order = rng.sample(workspaces, len(workspaces))
    few = max(2, len(order) // 60)
    unmapped, order = order[:few], order[few:]
    for workspace in unmapped:
        workspace.mapped = False
    changes = []
    for workspace in order:
        workspace.entered = _entered(rng, workspace.created)
        changes.append(CrmChange(workspace.entered, workspace.id, workspace.owners[0][1], _moment(workspace.created)))
    movable = [w for w in order if w.entered.timestamp() + BETWEEN_CHANGES + DAY < horizon]
    moves = max(4, len(order) // 25)
    for number, workspace in enumerate(movable[:moves]):
        for _ in range(2 if number % 4 == 0 else 1):
            move = _move(rng, workspace, customers, horizon)
            if move is not None:
                changes.append(move)
    changes += [_close(rng, workspace, horizon) for workspace in movable[moves : moves + few]]
    changes.sort(key=lambda change: (change.visible_at, change.workspace_id))
    return workspaces, changes


def _move(rng: Random, workspace: Workspace, customers: Sequence[Customer], horizon: int) -> CrmChange | None:
    """Give the workspace to another customer, some days after its last change became visible."""
    earliest = int(workspace.entered.timestamp()) + BETWEEN_CHANGES
    if earliest >= horizon:
        return None
    at = rng.randint(earliest, min(horizon - 1, earliest + 20 * DAY))
    others = [c.id for c in customers if c.created + DAY < at and c.id != workspace.owners[-1][1]]
    if not others:
        return None
    owner = rng.choice(others)
    workspace.owners.append((at, owner))
    workspace.entered = _entered(rng, at)
    return CrmChange(workspace.entered, workspace.id, owner, _moment(at))


def _close(rng: Random, workspace: Workspace, horizon: int) -> CrmChange:
    """Close the workspace: no use from then on, and its row is marked deleted."""
    at = rng.randint(int(workspace.entered.timestamp()) + BETWEEN_CHANGES, horizon)
    workspace.closed = at
    workspace.entered = _moment(at) + timedelta(seconds=rng.randint(2, 300))
    return CrmChange(workspace.entered, workspace.id, workspace.owners[-1][1], _moment(at), deleted=True)


def make_memberships(
    rng: Random, workspaces: Sequence[Workspace], members: Sequence[Sequence[str]], horizon: int
) -> list[MembershipChange]:
    """The changes of who belongs to which workspace, sorted by when they become visible.

    members: user ids of each workspace; they belong to it from its creation to its closing. A few are guests of a second one
    for some days, in which the user alone does not tell the workspace.
    """
    changes = []
    for workspace, users in zip(workspaces, members, strict=True):
        for number, user in enumerate(users):
            role = "owner" if number == 0 else "admin" if number < 3 else "member"
            changes.append(_membership(rng, user, workspace.id, role, workspace.created))
            if workspace.closed is not None:
                changes.append(_membership(rng, user, workspace.id, role, workspace.closed, deleted=True))
    everyone = [(user, home) for home, users in enumerate(members) for user in users]
    for user, home in rng.sample(everyone, max(1, round(len(everyone) * GUESTS))):
        host = workspaces[(home + 1) % len(workspaces)]
        earliest = max(host.created, workspaces[home].created) + BETWEEN_CHANGES
        if host.id != workspaces[home].id and earliest + BETWEEN_CHANGES + DAY < min(host.closed or horizon, horizon):
            begin = rng.randint(earliest, min(host.closed or horizon, horizon) - BETWEEN_CHANGES - 1)
            changes.append(_membership(rng, user, host.id, "guest", begin))
            changes.append(_membership(rng, user, host.id, "guest", begin + BETWEEN_CHANGES, deleted=True))
    return sorted(changes, key=lambda change: (change.visible_at, change.user_id, change.workspace_id))


def _membership(rng: Random, user: str, workspace: str, role: str, at: int, *, deleted: bool = False) -> MembershipChange:
    return MembershipChange(_moment(at + rng.randint(2, 300)), user, workspace, role, _moment(at), deleted)
