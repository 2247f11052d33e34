"""Failpoints: nothing happens unless one is armed; then what was asked, when asked, once, and counted before."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyiceberg.exceptions import CommitFailedException

from lakehouse import failpoints
from lakehouse.failpoints import ACTIONS, PLACES, arm, hit
from lakehouse.settings import ROOT


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    arm("")


def test_nothing_is_armed_by_default() -> None:
    assert failpoints._armed == {}
    for place in PLACES:
        hit(place)


def test_the_nth_time_once_and_counted(tmp_path: Path) -> None:
    arm("commit.ready=lost@3,commit.checked=full", str(tmp_path / "log"))
    hit("commit.ready")
    hit("commit.ready")
    with pytest.raises(ConnectionError):
        hit("commit.ready")
    hit("commit.ready")
    with pytest.raises(OSError, match="no space left"):
        hit("commit.checked")
    assert (tmp_path / "log").read_text() == "commit.ready lost\ncommit.checked full\n"


def test_a_conflict_is_the_catalogs_own_kind() -> None:
    arm("commit.ready=conflict")
    with pytest.raises(CommitFailedException):
        hit("commit.ready")


@pytest.mark.parametrize("wrong", ["commit.redy=kill", "commit.ready=explode", "commit.ready", "commit.ready=kill@soon"])
def test_what_cannot_be_armed_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"commit\.re|soon"):
        arm(wrong)


def test_the_environment_arms_a_process(tmp_path: Path) -> None:
    environment = os.environ | {"STREAMFORGE_FAILPOINTS": "commit.done=kill", "STREAMFORGE_FAILPOINTS_LOG": str(tmp_path / "log")}
    script = "from lakehouse.failpoints import hit; hit('commit.done'); print('alive')"
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
    assert (tmp_path / "log").read_text() == "commit.done kill\n"


def test_every_place_is_in_the_code_once_and_in_the_manual() -> None:
    code = "".join(p.read_text("utf-8") for folder in ("lakehouse", "writers") for p in sorted((ROOT / folder).rglob("*.py")))
    assert sorted(re.findall(r'(?:failpoints\.)?hit\("([a-z.]+)"\)', code)) == sorted(PLACES)
    manual = (ROOT / "docs" / "faults.md").read_text("utf-8")
    for word in (*PLACES, *ACTIONS):
        assert f"`{word}`" in manual
