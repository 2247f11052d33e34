"""SIGTERM at any moment: a command that follows a source was told to stop and did, any other has not done its work."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
from command import Ran, finish, start

import lakehouse.cli.ingest


def catches_sigterm(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux: the handlers of another process are read in /proc"
)
@pytest.mark.parametrize(("arguments", "code"), [(("ingest", "--follow"), 0), (("ingest",), 130)])
def test_sigterm_while_a_command_starts(tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    """At the first moment at which it can be caught, while most modules are still to be imported."""
    process = start(tmp_path / "home", *arguments)
    while not catches_sigterm(process.pid):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    ran = finish(process)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("stopped")


@pytest.mark.parametrize(("arguments", "number", "code"), [
    (("ingest", "--follow"), signal.SIGTERM, 0),
    (("ingest", "--follow"), signal.SIGINT, 130),
    (("ingest",), signal.SIGTERM, 130),
])  # fmt: skip
def test_a_signal_before_the_first_batch(
    call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], number: int, code: int
) -> None:
    """Between the imports and the moment at which --follow takes the signals over."""

    def interrupted(_settings: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(lakehouse.cli.ingest, "find_services", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        ran = call(*arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ran.code == code
    assert ("stopped before it began" in ran.err) == (code == 0)


def test_a_signal_while_duckdb_is_at_work(call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB makes an error of its own of it, in which nobody would see that the command was only stopped."""

    def at_work(_settings: object) -> None:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        duckdb.execute("SELECT count(*) FROM range(1_000_000_000) a, range(1_000) b WHERE a.range % 7 = b.range % 5")

    monkeypatch.setattr(lakehouse.cli.ingest, "find_services", at_work)
    call("ingest").failed(130, "stopped; what was committed stays, run it again to go on")
