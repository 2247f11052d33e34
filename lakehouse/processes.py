"""A service as a child process: on free ports of 127.0.0.1, its log in a file, dead when this process is dead."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lakehouse.errors import Terminal, UsageError

HOST = "127.0.0.1"
LOG_TAIL_BYTES = 3_000
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def free_ports(count: int) -> list[int]:
    """Different loopback TCP ports that were free a moment ago (another process may take one before you do)."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    return free_ports(1)[0]


def accepts(port: int) -> bool:
    """Whether anything listens on the loopback port."""
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=0.2):
        return True
    return False


def require_free(port: int) -> None:
    """UsageError if a service could not listen on the loopback port."""
    with socket.socket() as probe:
        # As a service does: a port whose last connections are in TIME_WAIT is free, one that is listened to is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UsageError(
                f"port {port} on {HOST} cannot be listened on ({error.strerror}); "
                f"stop what listens there (see: ss -ltnp 'sport = :{port}'), or pass port 0 for a free one"
            ) from error


def die_with_parent() -> Callable[[], None] | None:
    """`preexec_fn` of a child, run between fork and exec so that the kernel kills it when we die, even by SIGKILL (Linux only).

    Everything is looked up here, before the fork, because code after it must not wait for a lock another thread held.
    The kernel's "parent" is the *thread* that starts the child: start it from one that lives as long as the child.
    """
    if not sys.platform.startswith("linux"):
        return None  # elsewhere only a normal exit (atexit) stops the child
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def run() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # we died before prctl took effect
            os._exit(1)

    return run


class Child:
    """One service process, from `launch` to `stop` or `kill`; it never outlives this process.

    Args:
        name: what messages call it.
        log_path: where its output goes, from the start of each launch on (keep_log: from the start of the first).
        stop_seconds: how long it may take to end in order when it is stopped; 0: it is killed, as it has nothing to save.
    """

    def __init__(self, name: str, log_path: Path, *, keep_log: bool = False, stop_seconds: float = 0.0) -> None:
        self.name, self.log_path = name, log_path
        self._keep_log, self._stop_seconds = keep_log, stop_seconds
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it has been launched and has not ended by itself."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id, from launch to stop.

        Raises:
            UsageError: it was not launched, or has been stopped.
        """
        return self._started().pid

    def launch(self, command: Sequence[str], environment: Mapping[str, str], cwd: Path) -> None:
        """Start it; `environment` comes on top of a bare one, since a developer's own settings must not reach a service."""
        if self.running:
            raise UsageError(f"{self.name} is already running (process {self.pid})")
        bare = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "TZ") if name in os.environ}
        cwd.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab" if self._keep_log else "wb") as log:
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
        atexit.register(self.stop)

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until `ready()` is true; if that does not come about, whatever the reason, it is killed.

        Raises:
            Terminal: the process ended, or is not ready in time; with the end of its log.
        """
        deadline = time.monotonic() + seconds
        try:
            while self.running and time.monotonic() < deadline:
                if ready():
                    return
                time.sleep(0.02)
            code = self._started().poll()
            raise self._failed(f"is not ready after {seconds:.0f} s" if code is None else f"ended at once (exit code {code})")
        except BaseException:
            self.kill()
            raise

    def finish(self, seconds: float) -> None:
        """Wait until it has done what it was launched for; if it takes longer, it is killed.

        Raises:
            Terminal: it failed, or was not done in time; with the end of its log.
        """
        try:
            code = self._started().wait(seconds)
        except subprocess.TimeoutExpired:
            raise self._failed(f"was not done after {seconds:.0f} s") from None
        finally:
            self.kill()
        if code:
            raise self._failed(f"failed (exit code {code})")

    def stop(self) -> None:
        """Let it end in order, in the time it is given; then, or if it is given none, kill it. Safe to call twice."""
        if self._process is not None and self._stop_seconds:
            self._process.send_signal(signal.SIGCONT)  # a paused one cannot end
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._stop_seconds)
        self.kill()

    def kill(self) -> None:
        """End it at once (SIGKILL). Safe to call twice."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is not None:
            process.kill()
            process.wait()

    def log_tail(self) -> str:
        """The end of its log."""
        if not self.log_path.exists():
            return "(empty)"
        return self.log_path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip() or "(empty)"

    def _failed(self, how: str) -> Terminal:
        return Terminal(f"{self.name} {how}.\nThe end of {self.log_path}:\n{self.log_tail()}")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise UsageError(f"{self.name} is not running")
        return self._process
