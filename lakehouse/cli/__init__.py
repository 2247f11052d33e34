"""The `lakehouse` command: commands that look (explore), do (operate) and render; errors become messages and exit codes."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

from lakehouse.errors import LakehouseError

STOPPED = 130
DUCKDB_STOPPED = "Query interrupted"
"""What DuckDB says, as a RuntimeError, when a signal came while it was at work: the KeyboardInterrupt does not get through."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every failure that we explain is one message on stderr and an exit code, no stack trace.

    Wrong usage is told by Typer itself (exit 2). A defect of ours keeps its stack trace. SIGTERM stops a command as Ctrl-C does:
    brokers ended, files removed, exit 130, for its work is not done. One that goes on until it is told to stop ends with 0.
    """
    endless = "--follow" in (sys.argv[1:] if arguments is None else arguments)
    told = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        signal.default_int_handler(number, frame)

    try:
        signal.signal(signal.SIGTERM, terminate)
        from lakehouse.cli import (  # noqa: F401 - they register their commands
            audit,
            backfill,
            bench,
            explain,
            explore,
            ingest,
            maintain,
            operate,
            positions,
            reconcile,
            rendering,
            replay,
            report,
            reproduce,
            revenue,
            shell,
        )
        from lakehouse.cli.app import app

        app(args=arguments, prog_name="lakehouse")  # ends with SystemExit
    except SystemExit as leaving:
        if leaving.code != STOPPED:  # so Typer ends at Ctrl-C, without a word
            raise
        _stopped("stopped; what was committed stays, run it again to go on", before_it_began=endless and told)
    except KeyboardInterrupt:
        _stopped("stopped", before_it_began=endless and told)
    except LakehouseError as error:
        _tell(str(error), "error: ")
        sys.exit(error.exit_code)
    except Exception as error:
        if isinstance(error, RuntimeError) and str(error) == DUCKDB_STOPPED:
            _stopped("stopped; what was committed stays, run it again to go on", before_it_began=False)
        if (message := _explained(error)) is None:
            raise
        _tell(message, "error: ")
        sys.exit(1)


def _stopped(said: str, *, before_it_began: bool) -> NoReturn:
    """End a command that was stopped; `--follow` takes the signals over when it begins (lakehouse/cli/ingest.py)."""
    _tell("stopped before it began" if before_it_began else said)
    sys.exit(0 if before_it_began else STOPPED)


def _explained(error: Exception) -> str | None:
    """What to say of a failure of the world around us: a file, a network, a database; None for a defect of our own."""
    from pyiceberg.exceptions import CommitFailedException

    from lakehouse.outages import explain, is_outage, without_password

    if isinstance(error, CommitFailedException):
        return "another commit came in between; nothing was changed, run it again"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return without_password(f"{error.filename}: {error.strerror}")
    return str(explain(error, "the Iceberg catalog or the object store")) if is_outage(error) else None


def _tell(text: str, prefix: str = "") -> None:
    from rich.console import Console
    from rich.markup import escape

    label = f"[bold red]{prefix}[/]" if prefix else ""
    Console(stderr=True, highlight=False).print(label + escape(text), soft_wrap=True)
