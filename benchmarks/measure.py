"""What every benchmark needs: the CPU time and the memory of the processes that it starts."""

from __future__ import annotations

import resource


def children_cpu_seconds() -> float:
    """User and system time of the child processes that have ended (and been waited for)."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def children_peak_rss_mb() -> float:
    """Peak resident memory of the largest child so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
