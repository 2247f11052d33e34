"""Every guarantee names a test that exists."""

from __future__ import annotations

import re

from lakehouse.settings import ROOT

PAGE = (ROOT / "docs" / "guarantees.md").read_text("utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]


def test_every_guarantee_names_a_test_that_exists() -> None:
    assert ROWS
    for row in ROWS:
        named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", row)
        assert named, f"proven by nothing: {row}"
        for path, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text("utf-8"), re.MULTILINE), f"{path} has no {name}"
