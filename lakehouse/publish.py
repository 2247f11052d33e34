"""Sending one change of a table to the Iceberg catalog: the loop that every change goes through, and what an answer means.

Reload, look whether an earlier attempt has landed, build the request on the state found, send it once. pyiceberg's own retry is
not used: it rebases without asking, and after a lost answer it deletes what is live. What is built is the caller's: data and
positions (lakehouse/commit.py), a rollback (lakehouse/rollback.py), an expiry (lakehouse/maintenance/expire.py).
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from pyiceberg.exceptions import CommitFailedException, NoSuchTableError
from pyiceberg.table import Table
from pyiceberg.table.update import TableRequirement, TableUpdate

from lakehouse import failpoints, metrics
from lakehouse.errors import CommitUnresolved, Terminal
from lakehouse.outages import explain, is_lasting, is_outage, is_refusal

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 60
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.02, 2.0

Request: TypeAlias = tuple[tuple[TableUpdate, ...], tuple[TableRequirement, ...]]
"""What is sent: the changes, and what must hold for them to be made."""


@dataclass
class Sent:
    """How often others were in the way."""

    conflicts: int = 0
    unknown_outcomes: int = 0


def publish(table: Table, build: Callable[[], Request | None], landed: Callable[[], bool], attempts: int | None = None) -> Sent:
    """Make one change of `table`, exactly once, whatever other writers do and whatever answer is lost.

    build: the request for the table as it stands, None if there is nothing to do; it raises what forbids the change. Between it
    and the swap other commits may land, so what it requires must say all that it relies on. landed: whether the table, as it
    stands, shows one of the requests built so far.

    Raises:
        CommitUnresolved: the catalog or the object store stayed away, or others came first each time.
        Terminal: the table was dropped; catalog or store refuse it (rights, keys), or the catalog calls the request wrong twice
            on the same state of the table. A defect of ours is raised as it is, on the same terms.
    """
    name = ".".join(table.name())
    sent, wait = Sent(), FIRST_WAIT_SECONDS
    attempts = MAX_ATTEMPTS if attempts is None else attempts
    last_error: Exception | None = None
    answer: Exception | None = None  # to the last request
    asked_on, times_wrong = "", 0
    for attempt in range(attempts):
        if attempt:
            time.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
            wait = min(wait * 2, LONGEST_WAIT_SECONDS)
        try:
            table.refresh()
        except NoSuchTableError:
            raise Terminal(f"{name}: the table was dropped while a job worked on it; staged files were kept") from None
        except Exception as error:  # an unreachable catalog says nothing about the commit: try to learn again
            if is_refusal(error) and answer is None:
                raise explain(error, f"{name}: loading the table") from error
            last_error = error
            continue
        if landed():
            return sent
        if answer and (is_refusal(answer) or (times_wrong > 1 and table.metadata_location == asked_on)):
            # said after a look: a refusal may answer what had been carried out
            if is_outage(answer):
                raise explain(answer, f"{name}: the commit", lasting=True) from answer
            raise answer
        try:
            request = build()
        except (OSError, CommitFailedException) as error:  # a manifest could not be read or written: nothing was sent
            if is_refusal(error) and not isinstance(error, FileNotFoundError):  # which maintenance may have removed since
                raise explain(error, f"{name}: writing manifests") from error
            last_error = error
            continue
        if request is None:
            return sent
        updates, requirements = request
        before, asked_on = asked_on, table.metadata_location
        try:
            failpoints.hit("commit.ready")
            table._do_commit(updates=updates, requirements=requirements)
            failpoints.hit("commit.answered")
        except Exception as error:
            last_error = answer = error
            # A refusal is clean only if the catalog says so; anything else (timeout, lost response) may have landed.
            # Either way the next turn looks for our own attempts before it does anything else.
            if isinstance(error, CommitFailedException):
                sent.conflicts += 1
                metrics.CONFLICTS.labels(name).inc()  # here, so that those of a commit that never lands count too
            else:
                sent.unknown_outcomes += 1
                metrics.UNKNOWN_OUTCOMES.labels(name).inc()
                log.warning("%s: outcome of a commit unknown (%s), looking it up", name, type(error).__name__)
            times_wrong = (times_wrong if before == asked_on else 0) + 1 if is_lasting(error) else 0
            continue
        failpoints.hit("commit.done")
        return sent
    raise CommitUnresolved(
        f"{name}: no commit in {attempts} attempts ({sent.conflicts} conflicts, {sent.unknown_outcomes} unknown outcomes; last: "
        f"{type(last_error).__name__}). Staged files were kept; run the job again"
    ) from last_error
