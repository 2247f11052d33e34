"""Workspaces and the CRM's knowledge of whose they are and who is in them: late, sometimes moved, shared, never entered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import TYPE_CHECKING

from simulator.chance import base62
from simulator.state import Customer

if TYPE_CHECKING:
    from simulator.identity import Stay

HOUR, DAY = 3_600, 86_400
ENTERED_LATE = 0.15
# A poller that reads the present state once a day (or each round of the demo) must see every change.
BETWEEN_CHANGES = 5 * DAY
FIRST, SECOND = "map_1", "map_2"


@dataclass(slots=True)
class Workspace:
    """A workspace. `mapped`: the CRM knows it.

    `owners`: (since epoch seconds, Stripe customer id), in order; None while the CRM names two at once.
    """

    id: str
    created: int
    owners: list[tuple[int, str | None]]
    closed: int | None = None
    mapped: bool = True
    entered: datetime = field(default=datetime.min.replace(tzinfo=UTC))


@dataclass(frozen=True, slots=True)
class CrmChange:
    """A row of the CRM as it becomes visible. `effective_at`: since when the mapping (or the deletion) holds.

    `mapping_id` tells the rows of a workspace apart: a move changes the customer in one, a second one is beside it.
    """

    visible_at: datetime
    workspace_id: str
    mapping_id: str
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
        owner = workspace.owners[0][1]
        assert owner
        changes.append(CrmChange(workspace.entered, workspace.id, FIRST, owner, _moment(workspace.created)))
    movable = [w for w in order if w.entered.timestamp() + BETWEEN_CHANGES + DAY < horizon]
    moves = max(6, len(order) // 25)
    for number, workspace in enumerate(movable[:moves]):
        for _ in range(2 if number % 4 == 0 else 1):
            move = _move(rng, workspace, customers, horizon)
            if move is not None:
                changes.append(move)
    closed = moves + few
    changes += [_close(rng, workspace, horizon) for workspace in movable[moves:closed]]
    for number, workspace in enumerate(movable[closed : closed + moves // 2]):
        changes += _share(rng, workspace, customers, horizon, handed_over=number % 2 == 0)
    changes.sort(key=lambda change: (change.visible_at, change.workspace_id, change.mapping_id))
    return workspaces, changes


def _next_owner(
    rng: Random, workspace: Workspace, customers: Sequence[Customer], horizon: int
) -> tuple[int, str] | tuple[None, None]:
    """Another customer, and when it gets the workspace: some days after the last change became visible."""
    earliest = int(workspace.entered.timestamp()) + BETWEEN_CHANGES
    if earliest >= horizon:
        return None, None
    at = rng.randint(earliest, min(horizon - 1, earliest + 20 * DAY))
    others = [c.id for c in customers if c.created + DAY < at and c.id != workspace.owners[-1][1]]
    return (at, rng.choice(others)) if others else (None, None)


def _move(rng: Random, workspace: Workspace, customers: Sequence[Customer], horizon: int) -> CrmChange | None:
    """Give the workspace to another customer."""
    at, owner = _next_owner(rng, workspace, customers, horizon)
    if at is None or owner is None:
        return None
    workspace.owners.append((at, owner))
    workspace.entered = _entered(rng, at)
    return CrmChange(workspace.entered, workspace.id, FIRST, owner, _moment(at))


def _share(
    rng: Random, workspace: Workspace, customers: Sequence[Customer], horizon: int, *, handed_over: bool
) -> list[CrmChange]:
    """Enter a second mapping beside the first; after some days one of the two ends (handed over: the first), if there is time."""
    first = workspace.owners[0][1]
    at, second = _next_owner(rng, workspace, customers, horizon)
    if at is None or second is None or first is None:
        return []
    workspace.owners.append((at, None))
    workspace.entered = _entered(rng, at)
    changes = [CrmChange(workspace.entered, workspace.id, SECOND, second, _moment(at))]
    end = int(workspace.entered.timestamp()) + rng.randint(BETWEEN_CHANGES, 3 * BETWEEN_CHANGES)
    if end < horizon:
        row, gone, left = (FIRST, first, second) if handed_over else (SECOND, second, first)
        workspace.owners.append((end, left))
        workspace.entered = _entered(rng, end)
        changes.append(CrmChange(workspace.entered, workspace.id, row, gone, _moment(end), deleted=True))
    return changes


def _close(rng: Random, workspace: Workspace, horizon: int) -> CrmChange:
    """Close the workspace: no use from then on, and its row is marked deleted."""
    at = rng.randint(int(workspace.entered.timestamp()) + BETWEEN_CHANGES, horizon)
    workspace.closed = at
    workspace.entered = _moment(at) + timedelta(seconds=rng.randint(2, 300))
    owner = workspace.owners[-1][1]
    assert owner
    return CrmChange(workspace.entered, workspace.id, FIRST, owner, _moment(at), deleted=True)


def make_memberships(
    rng: Random, workspaces: Sequence[Workspace], user_ids: Sequence[str], stays: Sequence[Stay]
) -> list[MembershipChange]:
    """The changes of who belongs to which workspace, sorted by when they become visible: some late, as mappings are."""
    changes = []
    for stay in stays:
        told = user_ids[stay.user], workspaces[stay.workspace].id, stay.role
        changes.append(MembershipChange(_entered(rng, stay.start), *told, _moment(stay.start)))
        if stay.end is not None:
            changes.append(MembershipChange(_entered(rng, stay.end), *told, _moment(stay.end), deleted=True))
    return sorted(changes, key=lambda change: (change.visible_at, change.user_id, change.workspace_id))
