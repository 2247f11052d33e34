"""A process that dies at a Python call: for tests of what a crash at any point of the code leaves behind."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def die_at(call: int) -> None:
    """SIGKILL this process at the so-manieth call of a Python or C function from now on, in this thread."""
    left = call

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal left
        if event in ("call", "c_call"):
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
