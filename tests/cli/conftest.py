"""The command line as its user meets it: `call` runs a command in this process (0.1 s), `world` is a home that a demo filled.

What only a process has (signals, a broken pipe, imports) is in command.py (1 s each).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import SMALL, Ran, finish, start

import lakehouse.cli
import lakehouse.cli.app


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ran]]:
    """Run a command in this process: `call("show", "product.events", LAKEHOUSE_HOME=...)`."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str, **environment: str) -> Ran:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            time.tzset()
            # read when the console was made; pytest in several processes sets its own
            patch.setattr(lakehouse.cli.app.out, "width", int(environment.get("COLUMNS", "160")))
            capsys.readouterr()
            with pytest.raises(SystemExit) as leaving:
                lakehouse.cli.main(list(arguments))
        time.tzset()
        code = leaving.value.code
        return Ran(code if isinstance(code, int) else int(code is not None), *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """A home with a small world in it, and what the demo that made it said."""
    home = tmp_path_factory.mktemp("demo") / "home"
    return home, finish(start(home, "demo", *SMALL), 280)


@pytest.fixture
def world(demo_run: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of the small world, as LAKEHOUSE_HOME."""
    home, ran = demo_run
    ran.fine()
    monkeypatch.setenv("LAKEHOUSE_HOME", str(home))
    return home
