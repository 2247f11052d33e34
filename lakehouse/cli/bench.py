"""The command `bench`: run a benchmark several times and print its medians."""

from __future__ import annotations

import difflib
from typing import Annotated

import typer

from lakehouse import parts
from lakehouse.cli.app import AsJson, app, out, print_json, print_rows
from lakehouse.cli.operate import telling
from lakehouse.errors import UsageError


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The benchmark; without it, a list of them.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="How many runs; the median of each figure is reported.")] = 3,
    scale: Annotated[float, typer.Option(min=0.0001, max=100.0, help="Fraction of the full size, for a quick look.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Measure: each run in a lake of its own, with real parts on this machine. Figures say what they count in their names."""
    suite = parts.benchmarks()
    if name is None:
        described = suite.describe()
        if as_json:
            print_json(described)
        else:
            print_rows(["benchmark", "measures"], list(described.items()))
        return
    if name not in suite.NAMES:
        close = difflib.get_close_matches(name, suite.NAMES, n=1)
        raise UsageError(f"no benchmark {name!r}; " + (f"did you mean {close[0]}?" if close else "see: lakehouse bench"))
    with telling() as say:
        result = suite.run(name, runs, scale, say)
    if as_json:
        print_json(result)
        return
    spread = {figure: [run[figure] for run in result["runs"]] for figure in result["median"]}
    rows = [[figure, value, min(spread[figure]), max(spread[figure])] for figure, value in result["median"].items()]
    print_rows(["figure", "median", "lowest", "highest"], rows, title=f"{name}, {runs} runs at scale {scale:g}")
    out.print()
