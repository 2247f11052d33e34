"""What every benchmark needs: the CPU time and the memory of the processes that it starts."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path


def children_cpu_seconds() -> float:
    """User and system time of the child processes that have ended (and been waited for)."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def children_peak_rss_mb() -> float:
    """Peak resident memory of the largest child so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def peak_rss_mb(pid: int) -> float:
    """Peak resident memory of a running process, in MiB; 0 if it has ended.

    Not `ru_maxrss`, which begins at the memory of whoever started the process: here that holds a world of events.
    """
    try:
        said = Path(f"/proc/{pid}/status").read_text("utf-8")
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in said.splitlines() if line.startswith("VmHWM:")), 0.0)


def forget_peak() -> None:
    """Let the peak of this process begin anew at what it holds now, where the system can (Linux: proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")
