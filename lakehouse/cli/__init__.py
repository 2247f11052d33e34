"""The `lakehouse` command: commands that look (explore), do (operate) and render; errors become messages and exit codes."""

from __future__ import annotations

import os
import sys

import click

from lakehouse.errors import LakehouseError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every failure that we explain is one message on stderr and an exit code, no stack trace."""
    from lakehouse.cli import explore, operate, rendering  # noqa: F401 - they register their commands
    from lakehouse.cli.app import app, err

    try:
        app(args=arguments, standalone_mode=False)
    except LakehouseError as error:
        err.print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        err.print("stopped; what was committed stays, run it again to go on")
        sys.exit(130)
    except BrokenPipeError:  # `lakehouse ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
