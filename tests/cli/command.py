"""The `lakehouse` command as a process of its own: started, waited for, and what it printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

COMMAND = Path(sys.executable).parent / "lakehouse"
SMALL = ("--customers", "40", "--days", "20", "--events", "5000", "--rounds", "2")
SMALLEST = ("--customers", "20", "--days", "20", "--events", "1000", "--rounds", "2")


@dataclass(frozen=True)
class Ran:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, which must be one JSON document and nothing else."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    def failed(self, code: int, *words: str) -> Ran:
        """Check that it ended with `code`, said all of `words` on stderr, no stack trace, and nothing on stdout."""
        assert (self.code, self.out) == (code, ""), self
        assert "Traceback" not in self.err
        said = " ".join(self.err.replace("│", " ").split())
        assert [w for w in words if w not in said] == [], said
        return self

    def fine(self) -> Ran:
        """Check that it ended with 0."""
        assert self.code == 0, self
        assert "Traceback" not in self.err
        return self


def start(home: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the real command, with nothing of the developer's own settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LAKEHOUSE_", "AWS_", "PYICEBERG_", "STREAMFORGE_"))}
    return subprocess.Popen(
        [COMMAND, *arguments],
        env=kept | {"LAKEHOUSE_HOME": str(home), "COLUMNS": "120", "PYTHONUNBUFFERED": "1"} | environment,
        cwd=home.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 90) -> Ran:
    """Wait for its end."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Ran(process.returncode, out, err)


@contextmanager
def services_up(home: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`lakehouse up` while the context is open; gives the process and what services.json says."""
    process = start(home, "up", *arguments, **environment)
    try:
        wait_for(lambda: (home / "run" / "services.json").exists(), process)
        yield process, json.loads((home / "run" / "services.json").read_text())
    finally:
        process.kill()
        process.wait()


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Wait until something has happened, while the process runs."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def brokers_of(home: Path) -> list[int]:
    """The embedded brokers that run over a home: they work in its folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.joinpath("cwd").readlink() == home / "run":
                found.append(int(process.name))
        except OSError:  # it ended meanwhile, or is not ours
            continue
    return found
