"""Every failure has one meaning: `Terminal` (a person must act) or `Retryable` (run it again).

An orchestrator maps the two families to fail and retry. Each message says what, where, and the next command to run.
"""

from __future__ import annotations


class LakehouseError(Exception):
    """Any failure the lakehouse itself explains; the CLI prints its message and no stack trace."""

    exit_code = 1


class Terminal(LakehouseError):
    """Running it again changes nothing: a person must act."""


class Retryable(LakehouseError):
    """Nothing was changed; the same job run again can succeed."""


class UsageError(Terminal):
    """The command, a setting or an argument is wrong."""

    exit_code = 2


class ChecksFailed(Terminal):
    """A blocking check refused the data; nothing was committed."""

    exit_code = 3


class DeclarationError(Terminal):
    """A file under `catalog/` is not a valid declaration; the message names file and column."""


class Fenced(Terminal):
    """The positions of the table are not those the job read when it began: another writer went on from them.

    The job must drop its buffer. Its staged files stay where they are: orphan removal takes them later.
    """


class RolledBack(Terminal):
    """The table's current snapshot is older than the one a position names; see `lakehouse show` and `lakehouse rollback`."""


class Replan(Retryable):
    """The files a rewrite planned on are gone, or files were added in its scope since its base: plan it again."""


class CommitUnresolved(Retryable):
    """The outcome of a commit could not be learned (the Iceberg catalog stayed away). Staged files were kept."""
