"""The report: sections declared in a folder (report.yaml and its query files), made into one HTML page that needs nothing else.

A section has blocks: a query over the tables, drawn and listed; once for each currency where the block says so, for money is
never added across currencies. Columns that end in `_minor` are shown in the units that people write, by the row's `currency`;
for a chart they are there without the suffix too. The road and the comparison with the truth come from the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from lakehouse.charts import draw
from lakehouse.completeness import NEVER, standings
from lakehouse.declarations import load_reference
from lakehouse.errors import DeclarationError, UsageError
from lakehouse.lake import Lake
from lakehouse.queries import query, tables_read
from lakehouse.transforms import load_transforms

Row = dict[str, Any]
UNKNOWN = "–"
NO_CURRENCY = "currency not known"


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one query shows. title, says: may name the column of `each` in braces; columns: {column: heading} of the table."""

    query: str
    title: str
    columns: dict[str, str]
    says: str = ""
    each: str | None = None
    chart: dict[str, Any] | None = None
    empty: str = "nothing to show yet"


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the page. definition: a heading of the definitions, up to its colon; shows: `road`, `truth`."""

    name: str
    title: str
    about: str
    definition: str
    shows: list[str] = []
    blocks: list[Block] = []


class Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`report.yaml`. definitions: a Markdown file, by its path from there."""

    title: str
    about: str
    definitions: str
    sections: list[Section]


@dataclass(frozen=True)
class Shown:
    """A block for the template: `why` there are no rows, or charts by width, headings and cells (text, is it a number)."""

    title: str
    says: str = ""
    why: str = ""
    charts: Mapping[str, Markup] = field(default_factory=dict)
    headings: Sequence[tuple[str, bool]] = ()
    rows: Sequence[Sequence[tuple[str, bool]]] = ()


def load_page(folder: Path) -> Page:
    """The declaration of the report.

    Raises:
        DeclarationError: it is not there, or not valid; names the file.
    """
    path = folder / "report.yaml"
    if not path.is_file():
        raise DeclarationError(f"{path}: no such file (LAKEHOUSE_REPORT_DIR says where the report is declared)")
    try:
        page = msgspec.yaml.decode(path.read_bytes(), type=Page)
    except msgspec.DecodeError as error:  # a ValidationError too
        raise DeclarationError(f"{path}: {error}") from None
    for name in (b.query for s in page.sections for b in s.blocks):
        if not (folder / name).is_file():
            raise DeclarationError(f"{path}: {folder / name} does not exist")
    known = definitions(folder / page.definitions)
    for section in page.sections:
        if section.definition not in known:
            raise DeclarationError(f"{path}: {section.name}: no heading {section.definition!r} in {page.definitions}")
    return page


def definitions(path: Path) -> dict[str, str]:
    """{heading up to its colon: the section as HTML} of a Markdown file; links become their text, for the page stands alone."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", path.read_text("utf-8"))
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
        found[heading.partition(":")[0].strip()] = markdown.render(f"### {heading}\n{body}")
    return found


def render(
    lake: Lake,
    road: Sequence[Row],
    truth: Mapping[str, Any] | str,
    say: Callable[[str, int, int], None] = lambda *_: None,
) -> str:
    """The page.

    road: a row a table (table, rows, last_commit_at, received_until, behind, fresh). truth: what was compared with it
    ({what: {figure: number}, "problems": [...]}), or why there is nothing to compare with.
    """
    folder = lake.settings.report_dir
    page = load_page(folder)
    reads = {s.name: _tables(folder, s) for s in page.sections}
    transforms = load_transforms(lake.settings.transforms_dir, lake.declarations)
    told = standings(lake, sorted(set().union(*reads.values()) & set(lake.declarations)), transforms)
    decimals = load_reference(lake.settings.catalog_dir, "currencies")
    sections = []
    for number, section in enumerate(page.sections):
        say(section.title, number, len(page.sections))
        blocks = [shown for b in section.blocks for shown in _shown(lake, folder, b, decimals)]
        sections.append({"section": section, "blocks": blocks, "standings": [told[t] for t in reads[section.name] if t in told]})
    environment = Environment(
        loader=PackageLoader("lakehouse"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"moment": moment, "day": day, "slug": slug}
    return environment.get_template("report.html.j2").render(
        page=page,
        sections=sections,
        road=road,
        layers=_layers(road),
        truth=truth,
        definitions={k: Markup(v) for k, v in definitions(folder / page.definitions).items()},  # noqa: S704 - raw HTML is off
        made_at=datetime.now(UTC),
        code_version=lake.run.code_version,
    )


def _layers(road: Sequence[Row]) -> list[Row]:
    """The road by layer; none if no table is there."""
    groups: dict[str, list[Row]] = {}
    for row in road:
        groups.setdefault(row["table"].partition(".")[0], []).append(row)
    found = []
    for layer, rows in groups.items():
        built = [r for r in rows if r["exists"]]
        found.append(
            {
                "layer": layer,
                "declared": len(rows),
                "built": len(built),
                "rows": sum(r["rows"] for r in built),
                "last_commit_at": max((r["last_commit_at"] for r in built if r["last_commit_at"]), default=None),
                "received_until": min((r["received_until"] for r in built if r["received_until"]), default=None),
                "behind": max((r["behind"] for r in built if r["behind"] is not None), default=None),
            }
        )
    return found if any(row["built"] for row in found) else []


def _tables(folder: Path, section: Section) -> list[str]:
    """The tables that a section reads, in the order of its queries."""
    found = (t for b in section.blocks for t in tables_read((folder / b.query).read_text("utf-8")))
    return list(dict.fromkeys(found))


def _shown(lake: Lake, folder: Path, block: Block, decimals: Mapping[str, int]) -> list[Shown]:
    """A block with its rows: once, or once for each value of its column `each`."""
    try:
        rows: list[Row] = query(lake, (folder / block.query).read_text("utf-8")).to_pylist()
    except UsageError as error:
        return [Shown(_named(block.title, {}), why=str(error).splitlines()[0])]
    if not rows:
        return [Shown(_named(block.title, {}), why=block.empty)]
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[block.each] if block.each else None, []).append(row)
    shown = []
    for value, group in groups.items():
        name = {} if block.each is None else {block.each: _each(block.each, value)}
        title, says = _named(block.title, name), _named(block.says, name)
        charts = {}
        if block.chart and group[0].get("currency", "") is not None:  # amounts of no known currency have no common scale
            charts = draw(block.chart, [_plottable(r, decimals) for r in group], title, says)
        kinds = {c: any(isinstance(r[c], int | float) and not isinstance(r[c], bool) for r in group) for c in block.columns}
        shown.append(
            Shown(
                title,
                says,
                charts={k: Markup(v) for k, v in charts.items()},  # noqa: S704 - Vega escapes the texts of a drawing
                headings=[(_named(h, name), kinds[c]) for c, h in block.columns.items()],
                rows=[[(cell(c, r[c], r.get("currency"), decimals), kinds[c]) for c in block.columns] for r in group],
            )
        )
    return shown


def _each(column: str, value: Any) -> str:
    if column == "currency":
        return str(value).upper() if value else NO_CURRENCY
    return UNKNOWN if value is None else str(value)


def _named(text: str, names: Mapping[str, str]) -> str:
    """`Net cash, {currency}` with its name; without one, what comes before it."""
    return text.format(**names) if names else re.sub(r",? ?\{\w+\}", "", text)


def money(minor: int, currency: str | None, decimals: Mapping[str, int]) -> str:
    """1234567 of usd: `12,345.67`; of jpy: `1,234,567`. Exact: no float in between."""
    places = decimals.get(currency or "", 2)
    whole, rest = divmod(abs(minor), 10**places)
    sign = "−" if minor < 0 else ""
    return f"{sign}{whole:,}" + (f".{rest:0{places}d}" if places else "")


def cell(column: str, value: Any, currency: str | None, decimals: Mapping[str, int]) -> str:
    """A value as people read it: the name of its column says what it is (`_minor` money, `_rate` and `_share` of a hundred)."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if column.endswith("_minor"):
        return money(value, currency, decimals)
    if column.endswith(("_rate", "_share")):
        return f"{value:.2%}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return moment(value, "") if isinstance(value, datetime) else str(value)


def _plottable(row: Row, decimals: Mapping[str, int]) -> Row:
    """A row as JSON values; money also in major units, under the name without `_minor`: for drawing only."""
    values = {k: v.isoformat() if isinstance(v, date | datetime) else v for k, v in row.items()}
    scale = 10 ** decimals.get(row.get("currency") or "", 2)
    majors = {k.removesuffix("_minor"): v / scale for k, v in row.items() if k.endswith("_minor") and v is not None}
    return values | majors


def moment(value: datetime | None, zone: str = " UTC") -> str:
    """A time in UTC to the minute."""
    return f"{value.astimezone(UTC):%Y-%m-%d %H:%M}{zone}" if value else "nothing yet"


def day(value: date | None) -> str:
    """A day; no day for `NEVER`."""
    return "no day yet" if value is None or value == NEVER else f"{value:%Y-%m-%d}"


def slug(text: str) -> str:
    """A name that can stand in a link of the page."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
