"""Failpoints: named places where a fault can be made to happen, so that a crash at any step is a test and not a hope.

Off, and one look at an empty mapping, unless STREAMFORGE_FAILPOINTS arms some (comma separated `PLACE=ACTION@N`: at the N-th time
the place is reached, once). STREAMFORGE_FAILPOINTS_LOG names a file that gets a line `PLACE ACTION` before the action. Nothing in
production sets either; docs/faults.md lists the places.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass

from pyiceberg.exceptions import CommitFailedException

PLACES = {
    "consume.read": "records were read from Kafka, and lie in memory",
    "stage.begin": "a row group goes to disk; the files of the batch are not whole",
    "stage.written": "its Parquet files are whole; no snapshot names them",
    "commit.checked": "the positions are as expected; manifests are not written yet",
    "commit.ready": "manifests are written; the catalog has not been asked",
    "commit.answered": "the catalog has the commit and said so; nobody here knows yet",
    "commit.done": "the commit is known to have landed; the writer has not gone on",
}
ACTIONS = ("kill", "stop", "lost", "conflict", "full")


@dataclass
class _Armed:
    action: str
    left: int  # times the place must still be reached


_armed: dict[str, _Armed] = {}
_log: str | None = None


def hit(place: str) -> None:
    """A place is reached; what is armed there happens."""
    if _armed:
        _reached(place)


def arm(text: str, log: str | None = None) -> None:
    """Arm failpoints, `PLACE=ACTION@N,...`; ValueError if there is no such place or action."""
    global _log
    armed = {}
    for one in filter(None, text.split(",")):
        place, _, what = one.partition("=")
        action, _, count = what.partition("@")
        if place not in PLACES or action not in ACTIONS:
            raise ValueError(
                f"failpoint {one!r}: PLACE=ACTION@N, with a place of {', '.join(PLACES)} and an action of {', '.join(ACTIONS)}"
            )
        armed[place] = _Armed(action, int(count or 1))
    _armed.clear()
    _armed.update(armed)
    _log = log


def _reached(place: str) -> None:
    armed = _armed.get(place)
    if armed is None:
        return
    armed.left -= 1
    if armed.left:
        return
    del _armed[place]
    if _log:
        file = os.open(_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(file, f"{place} {armed.action}\n".encode())
        os.close(file)
    if armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif armed.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif armed.action == "lost":
        raise ConnectionResetError(errno.ECONNRESET, f"failpoint {place}: the connection was lost")
    elif armed.action == "conflict":
        raise CommitFailedException(f"failpoint {place}: another commit came first")
    else:
        raise OSError(errno.ENOSPC, f"failpoint {place}: no space left on device")


arm(os.environ.get("STREAMFORGE_FAILPOINTS", ""), os.environ.get("STREAMFORGE_FAILPOINTS_LOG"))
