"""Commands that look: sql, show, where, status, settings."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import duckdb
import msgspec
import pyarrow as pa
import typer
from rich.markup import escape

from lakehouse.cli.app import AsJson, age, app, counted, err, lake, out, print_json, print_records, print_rows, size
from lakehouse.completeness import notes
from lakehouse.declarations import LAYERS, Declaration
from lakehouse.errors import UsageError
from lakehouse.lake import Lake, history, ignored_records
from lakehouse.live import rows_in
from lakehouse.outages import without_password
from lakehouse.positions import dump_vector, vector_of
from lakehouse.queries import query, tables_read
from lakehouse.settings import PREFIX, ROOT, Settings, load_settings
from lakehouse.transforms import load_transforms, upstream

TableName = Annotated[str, typer.Argument(metavar="TABLE", help="Name of a table, e.g. product.events.")]


def parse_as_of(value: str | None) -> datetime | int | None:
    """`--as-of`: a snapshot id, or an ISO-8601 time (UTC unless it says otherwise).

    Raises:
        UsageError: neither.
    """
    if value is None:
        return None
    if value.isascii() and value.isdigit() and len(value) > 8:
        return int(value)
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        raise UsageError(f"--as-of {value!r} is neither a snapshot id nor a time like 2026-03-01T12:00:00Z") from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def check_question(opened: Lake, text: str) -> None:
    """Let through one SELECT (or FROM, VALUES, DESCRIBE, SUMMARIZE) over tables that are declared.

    Anything else would at best change the private copy the query runs in, and `COPY ... TO` writes files.

    Raises:
        UsageError: saying what is wrong with it, and where.
    """
    try:
        statements = duckdb.extract_statements(text)
    except duckdb.Error as error:
        raise UsageError(f"SQL error: {error}") from None
    if len(statements) != 1:
        # an open PIVOT becomes two
        what = "no query" if not statements else f"{len(statements)} statements (for PIVOT, list the values: ON x IN (...))"
        raise UsageError(f"one query at a time, this is {what}")
    if statements[0].type != duckdb.StatementType.SELECT:
        raise UsageError(
            f"{statements[0].type.name}: `lakehouse sql` only reads. Tables change by `lakehouse ingest`, `run` and `rollback`; "
            'to keep a result: lakehouse sql --json "SELECT ..." > file'
        )
    for name in tables_read(text):
        if name.partition(".")[0] in LAYERS:
            opened.declaration(name)  # its error names the closest table


@app.command()
def sql(
    text: Annotated[str, typer.Argument(metavar="QUERY", help="DuckDB SQL over every table by its name.")],
    as_of: Annotated[
        str | None, typer.Option("--as-of", help="Time travel: a time (UTC) or a snapshot id (see: lakehouse show TABLE).")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Print at most so many rows (--json prints all).")] = 50,
    as_json: AsJson = False,
) -> None:
    """Ask the lake a question, in DuckDB SQL; now, or as it was.

    Examples:

      lakehouse sql "SELECT plan, count(*) FROM product.events GROUP BY plan"

      lakehouse sql "SELECT count(*) FROM product.events" --as-of 2026-03-01T12:00:00Z
    """
    moment = parse_as_of(as_of)
    opened = lake()
    print_result(ask(opened, text, moment), rows, as_json=as_json)
    if moment is None:  # what a snapshot of old was complete until, its own column `complete` says
        for note in notes(opened, text).values():
            err.print(f"[dim]{escape(note)}[/]", soft_wrap=True)


def ask(opened: Lake, text: str, moment: datetime | int | None) -> pa.Table:
    """The rows of one question; Ctrl-C stops it within a moment: DuckDB looks for signals only between its (long) tasks.

    Raises:
        UsageError: see `check_question` and `query`.
    """
    check_question(opened, text)
    running: list[duckdb.DuckDBPyConnection] = []
    with ThreadPoolExecutor(1, "query") as worker:
        answer = worker.submit(query, opened, text, moment, on_connection=running.append)
        try:
            while not answer.done():  # a signal that another thread gets does not end a wait without end
                wait([answer], timeout=0.1)
            return answer.result()
        except KeyboardInterrupt:
            while not answer.done():  # it may not have begun when it was first told
                for connection in running:
                    with contextlib.suppress(duckdb.Error):
                        connection.interrupt()
                wait([answer], timeout=0.1)
            raise


def print_result(found: pa.Table, rows: int, *, as_json: bool) -> None:
    """Print what a question brought: the first `rows` of it for people, or all of it as JSON.

    Raises:
        UsageError: Python has no value for a value of the result.
    """
    shown = found if as_json else found.slice(0, rows)
    try:
        values = list(zip(*(c.to_pylist() for c in shown.columns), strict=True))
    except (OverflowError, ValueError) as error:  # DuckDB's times reach to the year 294247, and to infinity
        raise UsageError(f"a value of the result cannot be shown ({error}); cast it: CAST(... AS VARCHAR)") from None
    if as_json:
        names = unique(found.column_names)
        print_json([dict(zip(names, row, strict=True)) for row in values])
        return
    print_records(found.column_names, values)
    if found.num_rows > rows:
        out.print(f"[dim]{rows:,} of {found.num_rows:,} rows; more with --rows N[/]")
    elif not found.num_rows:
        out.print("[dim]no rows[/]")


def unique(names: list[str]) -> list[str]:
    """Names made distinct as DuckDB does: a, a_1, a_2."""
    taken: dict[str, None] = {}
    for name in names:
        tries = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
        taken[next(n for n in tries if n not in taken)] = None
    return list(taken)


def describe(lake: Lake, name: str) -> dict[str, Any]:
    """Everything `show` says of one table: declaration, size, freshness, positions, the last snapshots."""
    declared = lake.declaration(name)
    found: dict[str, Any] = {"table": name, "declaration": msgspec.to_builtins(declared), "exists": lake.exists(name)}
    found["declaration"]["path"] = _relative(declared.path)
    if not found["exists"]:
        return found | {"snapshots": []}
    table = lake.load(name)
    snapshots = history(table)
    summary: dict[str, str] = dict(snapshots[0].summary.additional_properties) if snapshots and snapshots[0].summary else {}
    last = datetime.fromtimestamp(snapshots[0].timestamp_ms / 1000, UTC) if snapshots else None
    age = (datetime.now(UTC) - last).total_seconds() if last else None
    return found | {
        "rows": rows_in(summary),
        "files": int(summary.get("total-data-files", 0)),
        "bytes": int(summary.get("total-files-size", 0)),
        "last_commit_at": last,
        "seconds_since_commit": round(age, 1) if age is not None else None,
        "fresh": None if age is None or declared.freshness_minutes is None else age <= declared.freshness_minutes * 60,
        "location": table.location(),
        "metadata_location": table.metadata_location,
        "positions": dump_vector(vector_of(table.metadata, name)),
        "snapshots": [
            {
                "snapshot_id": s.snapshot_id,
                "committed_at": datetime.fromtimestamp(s.timestamp_ms / 1000, UTC),
                **_summary(s.summary.additional_properties if s.summary else {}),
            }
            for s in snapshots
        ],
    }


def _summary(properties: dict[str, str]) -> dict[str, Any]:
    def count(name: str) -> int:
        return int(properties.get(name, 0))

    return {
        "kind": properties.get("lakehouse.kind", "?"),
        "added_rows": count("added-records"),
        "removed_rows": count("deleted-records") + count("added-position-deletes") - count("removed-position-deletes"),
        "total_rows": rows_in(properties),
        "run_id": properties.get("lakehouse.run-id"),
        "code_version": properties.get("lakehouse.code-version"),
        "inputs": properties.get("lakehouse.inputs"),
    }


@app.command()
def show(
    table: TableName,
    snapshots: Annotated[int, typer.Option("--snapshots", min=0, help="How many of the last snapshots to list.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Show one table: its declaration, columns and PII classes, size, freshness, positions, snapshots."""
    found = describe(lake(), table)
    if as_json:
        print_json(found)
        return
    declared = found["declaration"]
    out.print(f"[bold]{table}[/]: {escape(declared['doc'])}\n")
    facts = {
        "grain": declared["grain"],
        "key": ", ".join(declared["primary_key"]),
        "owner": declared["owner"],
        "partitioned by": ", ".join(f"{p['transform']}({p['column']})" for p in declared["partition"]) or "nothing",
        "retention": f"{declared['retention_days']} days" if declared["retention_days"] else "for ever",
        "declared in": declared["path"],
    }
    if found["exists"]:
        fresh = {None: "", True: ", fresh", False: f", older than its target of {declared['freshness_minutes']} min"}
        at = found["last_commit_at"]
        facts |= {
            "size": f"{counted(found['rows'], 'row')}, {counted(found['files'], 'file')}, {size(found['bytes'])}",
            "last commit": f"{at:%Y-%m-%d %H:%M:%S}Z, {age(found['seconds_since_commit'])}{fresh[found['fresh']]}"
            if at
            else "none yet",
            "positions": "\n".join(f"{k}: {v:,}" for k, v in found["positions"].items()) or "none",
        }
    else:
        facts["size"] = "holds nothing yet; fill it: lakehouse demo"
    print_rows(["", ""], facts.items())
    print_rows(
        ["column", "type", "required", "PII", "meaning"],
        [
            [
                c["name"],
                type_name(c["type"]),
                "yes" if c["required"] else "",
                c["pii"],
                c["doc"],
            ]
            for c in declared["columns"]
        ],
        title="columns",
    )
    if found["exists"] and snapshots:
        print_snapshots(found["snapshots"][:snapshots], title=f"last snapshots, of {len(found['snapshots'])}")


def type_name(declared: str | dict[str, Any]) -> str:
    """The type of a column, in a word."""
    return declared if isinstance(declared, str) else str(declared["type"])


def print_snapshots(found: list[dict[str, Any]], title: str | None = None) -> None:
    """The snapshots of a table, as `describe` gives them."""
    print_rows(
        ["snapshot", "committed at", "kind", "added", "removed", "total"],
        [
            [str(s["snapshot_id"]), s["committed_at"], s["kind"], s["added_rows"], s["removed_rows"], s["total_rows"]]
            for s in found
        ],
        title,
    )


SEARCHED = ("catalog", "lakehouse", "writers", "transforms", "dags", "simulator", "tests", "benchmarks", "docs", "report")


def _relative(path: Path | str) -> str:
    """A path as a reader of the repository writes it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _project_files() -> Iterator[Path]:
    """Files of the project, as git lists them; without git, all text files of its folders."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", *SEARCHED],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        yield from (ROOT / line for line in listed.stdout.splitlines())
        return
    for folder in SEARCHED:
        yield from (p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in {".py", ".sql", ".yaml", ".md", ".json"})


def files_concerning(declared: Declaration) -> dict[str, list[str]]:
    """The files that concern one table: its own (by their name), and those that name it."""
    own: list[str] = []
    naming: list[str] = []
    for path in _project_files():
        relative = path.relative_to(ROOT)
        if declared.name in (path.stem, *relative.parts) and declared.layer in relative.parts:
            own.append(str(relative))
            continue
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if declared.table in path.read_text("utf-8"):
                naming.append(str(relative))
    if not Path(declared.path).is_relative_to(ROOT):
        own.insert(0, declared.path)
    return {"own": sorted(own), "naming": sorted(naming)}


@app.command()
def where(table: TableName, as_json: AsJson = False) -> None:
    """List every file that concerns a table: its declaration, transform and cases, then every file that names it."""
    opened = lake()
    declared = opened.declaration(table)
    found: dict[str, Any] = {"table": table, **files_concerning(declared)}
    transforms = load_transforms(opened.settings.transforms_dir, opened.declarations)
    found["made_from"] = list(upstream(declared, transforms[table])) if table in transforms else []
    found["feeds"] = [n for n, t in transforms.items() if table in upstream(opened.declarations[n], t)]
    if as_json:
        print_json(found)
        return
    for title, key in (
        ("its own files", "own"),
        ("files that name it", "naming"),
        ("made from", "made_from"),
        ("feeds", "feeds"),
    ):
        out.print(f"[bold]{title}[/]")
        for line in found[key] or ["-"]:
            out.print(f"  {escape(line)}", soft_wrap=True)


STATUS = ("rows", "files", "bytes", "last_commit_at", "snapshots", "behind", "ignored")


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show every table: rows, size, snapshots, when it last changed, and how far it is behind its source."""
    rows = road(lake())
    now = datetime.now(UTC)
    if as_json:
        print_json(rows)
        return
    print_rows(
        ["table", "rows", "size", "last commit", "behind"],
        [
            [
                r["table"],
                r["rows"],
                size(r["bytes"]) if r["exists"] else None,
                age((now - r["last_commit_at"]).total_seconds()) if r["last_commit_at"] else None,
                r["behind"],
            ]
            for r in rows
        ],
    )
    for row in rows:
        if row["ignored"]:
            said = f"records of a kind that {row['table']} does not keep; they stay in raw"
            out.print(f"\nignored: {row['ignored']:,} {said}")
    if not any(r["rows"] for r in rows):
        out.print("\nThe lake is empty. Fill it: [bold]lakehouse demo[/]")
    elif any(r["behind"] for r in rows):
        out.print("\nbehind: records of its sources that a table has not seen. Catch up: [bold]lakehouse run[/]", soft_wrap=True)


def road(opened: Lake) -> list[dict[str, Any]]:
    """A row a declared table: what `status` says of it."""
    transforms = load_transforms(opened.settings.transforms_dir, opened.declarations)
    rows = []
    for name, declared in opened.declarations.items():
        row: dict[str, Any] = {"table": name, "exists": opened.exists(name), **dict.fromkeys(STATUS)}
        if row["exists"]:
            found = describe(opened, name)
            row |= {k: found[k] for k in STATUS if k in found} | {"snapshots": len(found["snapshots"])}
            row["behind"] = _behind(opened, name, declared, transforms)
            row["ignored"] = ignored_records(opened.load(name)) if declared.build.mode == "insert" else None
        rows.append(row)
    return rows


def _behind(lake: Lake, name: str, declared: Declaration, transforms: dict[str, Any]) -> int | None:
    """Records that the driver (or the inputs) of a table hold beyond its positions; None for raw tables."""
    if name not in transforms:
        return None
    reached = lake.vector(name)
    ahead: dict[tuple[str, int], int] = {}
    for source in upstream(declared, transforms[name]):
        for key, offset in lake.vector(source).items():
            ahead[key] = max(ahead.get(key, 0), offset)
    return sum(offset - reached.get(key, 0) for key, offset in ahead.items())


@app.command()
def settings(as_json: AsJson = False) -> None:
    """Show every setting, its environment variable, its value (secrets hidden) and meaning."""
    wrong: UsageError | None = None
    try:
        values = load_settings()
    except UsageError as error:  # show what can be set, then say what is wrong
        wrong, values = error, Settings.model_construct()
    rows = []
    for name, field in Settings.model_fields.items():
        value = getattr(values, name)
        rows.append(
            {
                "variable": PREFIX + name.upper(),
                "value": plain_setting(value),
                "set": PREFIX + name.upper() in os.environ,
                "meaning": field.description or "",
            }
        )
    if as_json and wrong is None:
        print_json(rows)
        return
    print_rows(
        ["variable", "value", "meaning"],
        [[r["variable"] + ("*" if r["set"] else ""), "" if r["value"] is None else str(r["value"]), r["meaning"]] for r in rows],
    )
    out.print("\n[dim]* set in the environment; the others are defaults[/]")
    if wrong:
        raise wrong


def plain_setting(value: Any) -> Any:
    """A setting's value to show: secrets and the password of a URL as stars, paths as text."""
    if isinstance(value, list):
        return [str(v) for v in value]  # SecretStr prints stars
    return value if value is None or isinstance(value, int) else without_password(str(value))
