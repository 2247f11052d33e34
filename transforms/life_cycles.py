"""How far in its life a version of a Stripe object stands, by catalog/reference/life_cycles.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lakehouse.chains import Progress, State


def progress_of(cycles: Mapping[str, Any]) -> Progress:
    """The function that gives a version (its row: object_type, event_type; and its state) its place; greater is later.

    Places of one object type can be compared: first what the state says, then what the event's type says.
    """
    events = {kind: {event: n for n, event in enumerate(c.get("events", ()), start=1)} for kind, c in cycles.items()}
    states = {kind: list(c.get("states", {}).items()) for kind, c in cycles.items()}

    def progress(row: Mapping[str, Any], state: State) -> tuple[int, ...]:
        kind, event = row["object_type"], row["event_type"]
        told = events.get(kind, {})
        by_event = len(told) + 1 if event.endswith(".snapshot") else told.get(event, 0)
        return (*(_place(state.get(column), rule) for column, rule in states.get(kind, ())), by_event)

    return progress


def _place(value: Any, rule: Any) -> int:
    """The place of one value; -1 for one that is not carried, NULL or not known."""
    if isinstance(rule, Mapping):
        return int(rule.get(value, -1)) if isinstance(value, str) else -1
    if isinstance(value, list):
        return len(value)
    return int(value) if isinstance(value, int) else -1
