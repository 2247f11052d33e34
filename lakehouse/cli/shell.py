"""`lakehouse shell`: a prompt over every table, with time travel; what `lakehouse sql` answers, one question after another."""

from __future__ import annotations

import contextlib
import os
import readline
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import duckdb
import typer
from rich.markup import escape

from lakehouse.cli.app import app, err, lake, out, print_rows
from lakehouse.cli.explore import ask, describe, parse_as_of, print_result, print_snapshots, type_name
from lakehouse.completeness import notes
from lakehouse.errors import LakehouseError, UsageError
from lakehouse.lake import Lake

HISTORY, HISTORY_LINES = "shell_history", 1_000
WORDS = "SELECT FROM WHERE GROUP BY ORDER LIMIT JOIN USING LEFT COUNT SUM AVG MIN MAX DISTINCT WITH QUALIFY DESCRIBE SUMMARIZE"
MODES = ("table", "json")


@dataclass
class Session:
    """What one shell remembers: as of when it asks, how it prints."""

    lake: Lake
    as_of: str | None = None
    rows: int = 50
    mode: str = "table"
    timer: bool = True
    done: bool = False
    noted: set[str] = field(default_factory=set)
    commands: dict[str, Callable[[list[str]], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.moment: datetime | int | None = parse_as_of(self.as_of)
        self.commands = {
            ".help": self._help,
            ".tables": self._tables,
            ".schema": self._schema,
            ".snapshots": self._snapshots,
            ".asof": self._as_of,
            ".mode": self._mode,
            ".rows": self._rows,
            ".timer": self._timer,
            ".quit": self._quit,
        }

    def answer(self, text: str) -> None:
        """Run one statement, or one command that begins with a dot, and print what comes.

        Raises:
            LakehouseError: what is wrong with it.
        """
        name, *arguments = text.split()
        if not name.startswith("."):
            self._ask(text)
        elif len(fitting := [c for c in self.commands if c.startswith(name)]) == 1:
            self.commands[fitting[0]](arguments)
        else:
            raise UsageError(f"no command {name!r}; see .help")

    def _ask(self, text: str) -> None:
        started = time.monotonic()
        found = ask(self.lake, text, self.moment)
        elapsed = time.monotonic() - started
        print_result(found, self.rows, as_json=self.mode == "json")
        if self.timer:
            err.print(f"[dim]{elapsed:.2f} s[/]")
        for table, note in notes(self.lake, text, self.noted).items() if self.moment is None else ():
            self.noted.add(table)
            err.print(f"[dim]{escape(note)}[/]", soft_wrap=True)

    def _help(self, _: list[str]) -> None:
        """this list"""
        out.print(
            "A query of DuckDB SQL over the tables by their names, ended by ; (Ctrl-C: forget it, or stop it while it runs)\n"
        )
        usage = {
            ".schema": " TABLE",
            ".snapshots": " TABLE",
            ".asof": " [TIME|SNAPSHOT|now]",
            ".mode": " table|json",
            ".rows": " N",
        }
        print_rows(["", ""], [(name + usage.get(name, ""), command.__doc__) for name, command in self.commands.items()])

    def _tables(self, _: list[str]) -> None:
        """every table and what a row of it is"""
        print_rows(["table", "grain"], [(name, d.grain) for name, d in self.lake.declarations.items()])

    def _schema(self, arguments: list[str]) -> None:
        """the columns of a table, with their meaning"""
        declared = self.lake.declaration(_one(arguments, "TABLE"))
        columns = [(c.name, type_name(c.type), c.pii, c.doc) for c in declared.columns]
        print_rows(["column", "type", "PII", "meaning"], columns)

    def _snapshots(self, arguments: list[str]) -> None:
        """the history of a table: what to ask as of"""
        print_snapshots(describe(self.lake, _one(arguments, "TABLE"))["snapshots"])

    def _as_of(self, arguments: list[str]) -> None:
        """ask the lake as it was then, until the next .asof; alone it says as of when"""
        if arguments:
            wanted = None if arguments == ["now"] else " ".join(arguments)
            self.moment, self.as_of = parse_as_of(wanted), wanted
        out.print(f"as of {self.as_of or 'now'}")

    def _mode(self, arguments: list[str]) -> None:
        """how results are printed"""
        if (wanted := _one(arguments, "table or json")) not in MODES:
            raise UsageError(f"no mode {wanted!r}; modes: {', '.join(MODES)}")
        self.mode = wanted

    def _rows(self, arguments: list[str]) -> None:
        """print at most so many rows of a table"""
        wanted = _one(arguments, "a number")
        if not wanted.isascii() or not wanted.isdigit() or not int(wanted):
            raise UsageError(f".rows {wanted!r} is no number of rows")
        self.rows = int(wanted)

    def _timer(self, _: list[str]) -> None:
        """say how long each query took, or no longer"""
        self.timer = not self.timer
        out.print(f"timer {'on' if self.timer else 'off'}")

    def _quit(self, _: list[str]) -> None:
        """leave (so does Ctrl-D)"""
        self.done = True


def _one(arguments: list[str], what: str) -> str:
    if len(arguments) != 1:
        raise UsageError(f"it takes {what}")
    return arguments[0]


def statements(lines: Iterator[str]) -> Iterator[str]:
    """Lines -> whole statements: a dot command is one line, a query ends with `;`, or with the input."""
    held = ""
    for line in lines:
        if not held and line.lstrip().startswith("."):
            yield line.strip()
            continue
        *whole, held = _split(f"{held}\n{line}" if held else line)
        yield from whole
    if held:
        yield held


def _split(text: str) -> list[str]:
    """Queries that `;` ends, and what follows the last one ("" if that is a comment at most)."""
    # DuckDB's own lexer knows which `;` stands inside a string; it gives no tokens for comments
    ends = [at + 1 for at, kind in duckdb.tokenize(text) if kind == duckdb.token_type.operator and text.startswith(";", at)]
    *whole, rest = [text[a:b].strip() for a, b in pairwise([0, *ends, len(text)])]
    return [*(part for part in whole if part != ";"), rest if duckdb.tokenize(rest) else ""]


@app.command()
def shell(
    as_of: Annotated[
        str | None, typer.Option("--as-of", help="Time travel: a time (UTC) or a snapshot id; in the shell: .asof")
    ] = None,
) -> None:
    """Open a prompt over every table: DuckDB SQL, time travel, what was asked before.

    Queries end with a semicolon; .help lists what else there is. Through a pipe it answers all, and ends at the first error with
    its exit code.

    Examples:

      lakehouse shell

      echo "SELECT count(*) FROM product.events;" | lakehouse shell --as-of 2026-03-01
    """
    session = Session(lake(), as_of)
    if not sys.stdin.isatty():
        session.timer = False
        for text in statements(line.rstrip("\n") for line in sys.stdin):
            session.answer(text)
            if session.done:
                return
        return
    with _line_editing(session):
        _converse(session)


def _converse(session: Session) -> None:
    out.print("Every table by its name; end a query with ; (.help for more, .quit to leave)")
    while not session.done:
        try:
            text = next(statements(_prompted(session)), None)
            if text is None:  # Ctrl-D
                out.print()
                return
            session.answer(text)
        except KeyboardInterrupt:
            out.print("[dim]stopped[/]")
        except LakehouseError as error:
            err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)


def _prompted(session: Session) -> Iterator[str]:
    """Lines as they are typed, until Ctrl-D."""
    prompt = f"lake as of {session.as_of}> " if session.as_of else "lake> "
    with contextlib.suppress(EOFError):
        while True:
            yield input(prompt)
            prompt = "  ... "


@contextlib.contextmanager
def _line_editing(session: Session) -> Iterator[None]:
    """Tab completes tables, columns and commands; what was typed is kept in LAKEHOUSE_HOME, readable by its owner alone."""
    home = session.lake.settings.home
    history = home / HISTORY
    known = sorted(
        {*session.lake.declarations, *WORDS.split(), *session.commands}
        | {c for d in session.lake.declarations.values() for c in d.column_names}
    )
    readline.set_completer(lambda start, n: _completion(known, start, n))
    readline.set_completer_delims(" \t\n,;()=<>'\"")
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        _keep(history)


def _completion(known: list[str], start: str, number: int) -> str | None:
    fitting = [w for w in known if w.lower().startswith(start.lower())]
    return fitting[number] if number < len(fitting) else None


def _keep(history: Path) -> None:
    """Write the history; a home that cannot be written to loses it, and nothing else."""
    with contextlib.suppress(OSError):
        history.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
        readline.write_history_file(history)
