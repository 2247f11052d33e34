"""Processes of the `lakehouse` command that a round starts, hurts and ends.

Each is the command as a user runs it (its own `main`, arguments and environment), forked from a server that has imported it
already: importing would be most of what a writer of a few seconds does. They die when the harness does.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from lakehouse.processes import PR_SET_PDEATHSIG
from tests.dying import die_at

FOREIGN = ("LAKEHOUSE_", "AWS_", "PYICEBERG_", "STREAMFORGE_")


def fork_server() -> ForkServerContext:
    """The server that commands are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.chaos.preload"])
    return context


@dataclass
class Command:
    """One running command. `paused` while it is stopped by a signal."""

    process: ForkServerProcess
    arguments: Sequence[str]
    output: Path
    armed: str = ""
    began: float = field(default_factory=time.monotonic)
    paused: bool = False

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended; a stopped one has not."""
        return self.process.exitcode is None

    @property
    def said(self) -> str:
        """The end of what it wrote."""
        return self.output.read_text("utf-8", errors="replace")[-600:].strip()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it is there to get one."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):  # it ended, and the server that forked it has not said so yet
                os.kill(self.pid, number)
            self.paused = number == signal.SIGSTOP or (self.paused and number != signal.SIGCONT)

    def wait(self, seconds: float) -> int | None:
        """Its exit code; None if it still runs after `seconds`."""
        self.process.join(seconds)
        return self.process.exitcode


def start(
    context: ForkServerContext,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    output: Path,
    armed: str = "",
    failpoints_log: Path | None = None,
    die_at_call: int | None = None,
    sabotage: Callable[[], None] | None = None,
) -> Command:
    """Start `lakehouse ARGUMENTS`. armed: failpoints. die_at_call: SIGKILL at the so-manieth call. sabotage: run in it before."""
    output.touch()
    what = (list(arguments), dict(environment), str(output), armed, str(failpoints_log or ""), die_at_call, sabotage)
    process = context.Process(target=_run, args=what, daemon=True)
    process.start()
    return Command(process, arguments, output, armed)


def _run(
    arguments: list[str],
    environment: dict[str, str],
    output: str,
    armed: str,
    failpoints_log: str,
    die_at_call: int | None,
    sabotage: Callable[[], None] | None,
) -> None:
    from lakehouse import failpoints
    from lakehouse.cli import main

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)  # the fork server ends with the harness, we with it
    for name in [n for n in os.environ if n.startswith(FOREIGN)]:
        del os.environ[name]
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["lakehouse", *arguments]
    failpoints.arm(armed, failpoints_log or None)
    if sabotage:
        sabotage()
    if die_at_call is not None:
        die_at(die_at_call)
    main(arguments)
