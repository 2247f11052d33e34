"""The mutants of `make mutants` still fit the code, and one of them, run for real, is caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from lakehouse.settings import ROOT
from tests.mutants import MUTANTS, Mutant, caught_by, make_copy, sabotage

SMALL = ("demo", "--customers", "40", "--days", "20", "--events", "1000", "--rounds", "1", "--json")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_its_text_stands_once(mutant: Mutant) -> None:
    path = ROOT / mutant.file
    assert path.read_text("utf-8").count(mutant.old) == 1, "the code has moved on; the mutant must follow"


def test_one_is_caught(tmp_path: Path) -> None:
    make_copy(tmp_path)
    sabotage(tmp_path, next(m for m in MUTANTS if m.name == "strict-created"))
    assert caught_by(tmp_path, SMALL) == "verify"
