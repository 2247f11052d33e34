"""docs/questions.md: each question runs, in the shell, and its answer has the columns that the page shows."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from command import Ran

from lakehouse.settings import ROOT

PAGE = (ROOT / "docs" / "questions.md").read_text("utf-8")
QUESTIONS = re.findall(r"^## (.*?)\n.*?```sql\n(.*?)```.*?```text\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)


def test_there_are_ten() -> None:
    assert len(QUESTIONS) == len(re.findall(r"^## ", PAGE, re.MULTILINE)) == 10


@pytest.mark.parametrize(("title", "sql", "answer"), QUESTIONS, ids=[q[0].partition(".")[0] for q in QUESTIONS])
@pytest.mark.usefixtures("world")
def test_it_runs_and_answers_in_these_columns(
    call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, title: str, sql: str, answer: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(sql))
    ran = call("shell", COLUMNS="120").fine()
    header, _, *rows = ran.out.splitlines()
    assert header.split() == answer.splitlines()[0].split()
    if "WHERE complete" not in sql:  # the small world has no whole month
        assert rows[0] != "no rows", title
