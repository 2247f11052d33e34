"""The README is what a newcomer types: its commands run on a played world, its links lead somewhere, nothing is left open."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Ran

from lakehouse.declarations import load_declarations
from lakehouse.render.dictionary import render_dictionary
from lakehouse.render.model import render_model
from lakehouse.settings import ROOT, load_settings
from lakehouse.transforms import load_transforms

README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = [
    shlex.split(line[2:], comments=True)
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ lakehouse ")
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c[1:3])[:40])
@pytest.mark.usefixtures("world")
def test_its_commands_run(command: list[str], call: Callable[..., Ran]) -> None:
    arguments = command[1:]
    if "--as-of" in arguments:  # the README shows an id of its own run
        where = arguments.index("--as-of") + 1
        assert arguments[where].isdigit()
        arguments[where] = str(json.loads(call("show", "product.events", "--json").out)["snapshots"][-1]["snapshot_id"])
    ran = call(*arguments)
    assert ran.code == 0, ran.err
    assert ran.out


@pytest.mark.usefixtures("world")
def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(PYTHON) == 1
    exec(compile(PYTHON[0], "README.md", "exec"), found := {})
    assert found["table"].scan(row_filter="plan = 'pro'").count() > 0
    assert "count_star()" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere_and_nothing_is_left_open(page: Path) -> None:
    text = page.read_text("utf-8")
    assert "@@" not in text
    assert "TODO" not in text
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"`[^`]*`", "", text)):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target} leads nowhere"


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE), f"make {target} is in the README and not in the Makefile"


def test_dictionary_and_model_are_the_declarations() -> None:
    settings = load_settings()
    declarations = load_declarations(settings.catalog_dir)
    transforms = load_transforms(settings.transforms_dir, declarations)
    for page, rendered in (
        ("data-dictionary.md", render_dictionary(declarations, transforms)),
        ("data-model.md", render_model(declarations, transforms)),
    ):
        assert (ROOT / "docs" / page).read_text("utf-8") == rendered, "make render writes it again"
