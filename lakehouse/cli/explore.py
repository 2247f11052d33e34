"""Commands that look: sql, show, where, status, settings."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from lakehouse.cli.app import AsJson, app, lake, out, print_json, print_rows, size
from lakehouse.declarations import Declaration
from lakehouse.errors import UsageError
from lakehouse.lake import Lake, history
from lakehouse.positions import dump_vector, vector_of
from lakehouse.queries import query
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
    if value.lstrip("-").isdigit() and len(value) > 8:
        return int(value)
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        raise UsageError(f"--as-of {value!r} is neither a snapshot id nor a time like 2026-03-01T12:00:00Z") from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


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
    found = query(lake(), text, parse_as_of(as_of))
    if as_json:
        print_json(found.to_pylist())
        return
    shown = found.slice(0, rows)
    print_rows(found.column_names, zip(*(c.to_pylist() for c in shown.columns), strict=True))
    if found.num_rows > rows:
        out.print(f"[dim]{rows:,} of {found.num_rows:,} rows; more with --rows N[/]")


def describe(lake: Lake, name: str) -> dict[str, Any]:
    """Everything `show` says of one table: declaration, size, freshness, positions, the last snapshots."""
    declared = lake.declaration(name)
    found: dict[str, Any] = {"table": name, "declaration": msgspec.to_builtins(declared), "exists": lake.exists(name)}
    found["declaration"]["path"] = _relative(declared.path)
    if not found["exists"]:
        return found
    table = lake.load(name)
    snapshots = history(table)
    summary: dict[str, str] = dict(snapshots[0].summary.additional_properties) if snapshots and snapshots[0].summary else {}
    last = datetime.fromtimestamp(snapshots[0].timestamp_ms / 1000, UTC) if snapshots else None
    age = (datetime.now(UTC) - last).total_seconds() if last else None
    return found | {
        "rows": int(summary.get("total-records", 0)),
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
    return {
        "kind": properties.get("lakehouse.kind", "?"),
        "added_rows": int(properties.get("added-records", 0)),
        "removed_rows": int(properties.get("deleted-records", 0)),
        "total_rows": int(properties.get("total-records", 0)),
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
    out.print(f"[bold]{table}[/]: {declared['doc']}")
    facts = {
        "grain": declared["grain"],
        "key": ", ".join(declared["primary_key"]),
        "owner": declared["owner"],
        "partitioned by": ", ".join(f"{p['transform']}({p['column']})" for p in declared["partition"]) or "nothing",
        "retention": f"{declared['retention_days']} days" if declared["retention_days"] else "for ever",
        "declared in": declared["path"],
    }
    if found["exists"]:
        fresh = {None: "", True: ", fresh", False: f", older than its target of {declared['freshness_minutes']} min"}[
            found["fresh"]
        ]
        facts |= {
            "size": f"{found['rows']:,} rows, {found['files']:,} files, {size(found['bytes'])}",
            "last commit": f"{found['last_commit_at']:%Y-%m-%d %H:%M:%S}Z, {found['seconds_since_commit']:,.0f} s ago{fresh}",
            "positions": ", ".join(f"{k}: {v:,}" for k, v in found["positions"].items()) or "none",
        }
    else:
        facts["size"] = "holds nothing yet; fill it: lakehouse demo"
    print_rows(["", ""], facts.items())
    print_rows(
        ["column", "type", "required", "PII", "meaning"],
        [
            [c["name"], c["type"] if isinstance(c["type"], str) else c["type"]["type"], c["required"] or None, c["pii"], c["doc"]]
            for c in declared["columns"]
        ],
        title="\ncolumns",
    )
    if found["exists"] and snapshots:
        print_rows(
            ["snapshot", "committed at", "kind", "added", "removed", "total"],
            [
                [str(s["snapshot_id"]), s["committed_at"], s["kind"], s["added_rows"], s["removed_rows"], s["total_rows"]]
                for s in found["snapshots"][:snapshots]
            ],
            title=f"\nlast snapshots, of {len(found['snapshots'])}",
        )


SEARCHED = ("catalog", "lakehouse", "writers", "transforms", "dags", "simulator", "tests", "benchmarks", "docs")


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
            out.print(f"  {line}")


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show every table: rows, size, snapshots, when it last changed, and how far it is behind its source."""
    opened = lake()
    transforms = load_transforms(opened.settings.transforms_dir, opened.declarations)
    rows: list[dict[str, Any]] = []
    for name, declared in opened.declarations.items():
        row: dict[str, Any] = {"table": name, "exists": opened.exists(name)}
        if row["exists"]:
            found = describe(opened, name)
            row |= {k: found[k] for k in ("rows", "files", "bytes", "last_commit_at")} | {"snapshots": len(found["snapshots"])}
            row["behind"] = _behind(opened, name, declared, transforms)
        rows.append(row)
    if as_json:
        print_json(rows)
        return
    print_rows(
        ["table", "rows", "files", "size", "snapshots", "last commit", "records behind"],
        [
            [r["table"], r["rows"], r["files"], size(r["bytes"]), r["snapshots"], r["last_commit_at"], r["behind"]]
            if r["exists"]
            else [r["table"], None, None, None, None, None, None]
            for r in rows
        ],
    )
    if not any(r["exists"] for r in rows):
        out.print("\nThe lake is empty. Fill it: [bold]lakehouse demo[/]")


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
    values = load_settings()
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
    if as_json:
        print_json(rows)
        return
    print_rows(["variable", "value", "set", "meaning"], [list(r.values()) for r in rows])


def plain_setting(value: Any) -> Any:
    """A setting's value to show: secrets as stars, paths as text."""
    if isinstance(value, list):
        return [str(v) for v in value]  # SecretStr prints stars
    return value if value is None or isinstance(value, int) else str(value)
