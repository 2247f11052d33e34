"""A service as a child process: on free ports of 127.0.0.1, its log in a file, dead when this process is dead."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lakehouse.broker import HOST, die_with_parent
from lakehouse.errors import Terminal, UsageError

LOG_TAIL_BYTES = 2_000


def free_ports(count: int) -> list[int]:
    """Different loopback TCP ports that were free a moment ago (another process may take one before you do)."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class Child:
    """One service process, from `launch` to `kill`.

    Args:
        name: what messages call it. log_path: where its output goes, from the start of each launch on.
    """

    def __init__(self, name: str, log_path: Path) -> None:
        self.name, self.log_path = name, log_path
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it has been launched and has not ended by itself."""
        return self._process is not None and self._process.poll() is None

    def launch(self, command: Sequence[str], environment: Mapping[str, str], cwd: Path) -> None:
        """Start it; `environment` comes on top of a bare one, since a developer's own settings must not reach a service."""
        if self._process is not None:
            raise UsageError(f"{self.name} is already running (process {self._process.pid})")
        bare = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "TZ") if name in os.environ}
        cwd.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=bare | dict(environment),
                cwd=cwd,
                preexec_fn=die_with_parent(),
                start_new_session=True,  # Ctrl-C goes to us first: we finish with the service, then stop it
            )
        atexit.register(self.kill)

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until `ready()` is true.

        Raises:
            Terminal: the process ended, or is not ready in time; with the end of its log. It has been killed.
        """
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            if ready():
                return
            time.sleep(0.02)
        process = self._started()
        code = process.poll()
        how = f"is not ready after {seconds:.0f} s" if code is None else f"ended at once (exit code {code})"
        self.kill()
        raise Terminal(f"{self.name} {how}.\nThe end of {self.log_path}:\n{self.log_tail()}")

    def kill(self) -> None:
        """End it at once (SIGKILL). Safe to call twice."""
        process, self._process = self._process, None
        atexit.unregister(self.kill)
        if process is not None:
            process.kill()
            process.wait()

    def log_tail(self) -> str:
        """The end of its log."""
        if not self.log_path.exists():
            return "(empty)"
        return self.log_path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip() or "(empty)"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise UsageError(f"{self.name} is not running")
        return self._process
