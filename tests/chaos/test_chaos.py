"""A short real run of the harness on each catalog, and the proof that it would find a broken commit path out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lakehouse.local import KINDS, Kind
from lakehouse.local.kafka import KafkaBroker
from lakehouse.settings import ROOT
from tests.chaos.__main__ import EXIT_USAGE, run

pytestmark = pytest.mark.kafka


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_loses_and_doubles_nothing(kind: Kind, kafka: KafkaBroker, tmp_path: Path) -> None:
    report = run([kind], [0], 1, tmp_path / "chaos", kafka, seconds=3.0)
    assert report["failing"] == []
    assert report["records"] == 20_000
    assert sum(report["catalogs"][kind]["faults"].values()) >= 1
    assert json.loads(json.dumps(report)) == report
    assert list((tmp_path / "chaos").iterdir()) == [], "nothing is left of a clean run"


def _forget_what_landed() -> None:
    """A commit path as many have: after a lost answer it sends the same again, and nobody asks where the table stands."""
    from lakehouse import commit, failpoints

    commit._landed = lambda *_: None
    commit._refuse_fenced = lambda *_: None
    failpoints.arm("commit.answered=lost@1")


def test_a_commit_path_that_is_broken_is_found_out(kafka: KafkaBroker, tmp_path: Path) -> None:
    report = run(["sqlite"], [0], 1, tmp_path, kafka, records=2_000, seconds=2.0, sabotage=_forget_what_landed)
    assert report["doubled"] > 0
    (failing,) = report["failing"]
    assert (tmp_path / "sqlite" / "round-0" / "produced.arrow").exists()
    assert failing["verdict"]["first"]["doubled"]


def test_a_catalog_that_does_not_exist_is_wrong_usage() -> None:
    command = [sys.executable, "-m", "tests.chaos", "--catalog", "hive"]
    wrong = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (wrong.returncode, "there are sqlite, rest, glue" in wrong.stderr) == (EXIT_USAGE, True)
