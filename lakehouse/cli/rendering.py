"""The command `render`: Snowflake DDL, Soda contracts, data dictionary and data model, from the declarations."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from lakehouse.cli.app import AsJson, app, counted, err, lake, out, print_json
from lakehouse.errors import UsageError
from lakehouse.render.dictionary import render_dictionary
from lakehouse.render.model import render_model
from lakehouse.render.snowflake import render_snowflake
from lakehouse.render.soda import render_soda_contract
from lakehouse.transforms import load_transforms


class Rendering(StrEnum):
    """What can be rendered."""

    SNOWFLAKE = "snowflake"
    SODA = "soda"
    DICTIONARY = "dictionary"
    MODEL = "model"


@app.command()
def render(
    what: Annotated[
        Rendering,
        typer.Argument(metavar="WHAT", help="snowflake (DDL), soda (contracts), dictionary or model.", show_choices=False),
    ],
    tables: Annotated[list[str] | None, typer.Argument(metavar="TABLE", help="Tables (default: all).")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Write files into this folder instead of stdout.")] = None,
    as_json: AsJson = False,
) -> None:
    """Render the Snowflake DDL, the Soda contracts, the data dictionary or the data model from the declarations."""
    opened = lake()
    chosen = {n: opened.declaration(n) for n in tables} if tables else dict(opened.declarations)
    if what is Rendering.SNOWFLAKE:
        files = {"snowflake.sql": render_snowflake(chosen)}
    elif what is Rendering.SODA:
        files = {f"{d.layer}/{d.name}.yaml": render_soda_contract(d) for d in chosen.values()}
    else:
        transforms = load_transforms(opened.settings.transforms_dir, opened.declarations)
        if what is Rendering.DICTIONARY:
            files = {"data-dictionary.md": render_dictionary(chosen, transforms)}
        else:
            files = {"data-model.md": render_model(dict(opened.declarations), transforms)}
    if to is not None:
        if to.exists() and not to.is_dir():
            raise UsageError(f"--to {to}: not a folder")
        for name, text in files.items():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_text(text, "utf-8")
        err.print(f"wrote {counted(len(files), 'file')} to {escape(str(to))}", soft_wrap=True)
        if as_json:
            print_json([str(to / name) for name in files])
    elif as_json:
        print_json(files)
    else:
        out.file.write("\n---\n".join(files.values()))
