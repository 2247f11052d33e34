"""The data dictionary, in Markdown: every table and column as declared, and what each table is made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lakehouse.declarations import Declaration
from lakehouse.transforms import Transform, upstream


def render_dictionary(declarations: Mapping[str, Declaration], transforms: Mapping[str, Transform]) -> str:
    """One section a table, in the order of the declarations, with links between them."""
    lines = ["# Data dictionary", "", "Rendered from `catalog/`; change the declaration, not this page.", ""]
    lines += ["| table | grain | owner |", "|---|---|---|"]
    lines += [f"| {_link(d.table)} | {_cell(d.grain)} | {_cell(d.owner)} |" for d in declarations.values()]
    for declared in declarations.values():
        lines += _section(declared, transforms.get(declared.table))
    return "\n".join(lines) + "\n"


def _section(declared: Declaration, transform: Transform | None) -> Iterator[str]:
    yield from ("", f"## {declared.table}", "", " ".join(declared.doc.split()), "")
    inputs = upstream(declared, transform) if transform else ()
    partition = [p.column if p.transform == "identity" else f"{p.transform}({p.column})" for p in declared.partition]
    facts = {
        "grain": declared.grain,
        "key": _names(declared.primary_key),
        "owner": declared.owner,
        "made from": ", ".join(map(_link, inputs)) or "its source (a writer, or the machine itself)",
        "partitioned by": _names(partition) or "not partitioned",
        "retention": f"{declared.retention_days} days" if declared.retention_days else "for ever",
        "freshness": f"{declared.freshness_minutes} minutes" if declared.freshness_minutes else "no target",
    }
    yield from (f"- **{name}**: {value}" for name, value in facts.items())
    yield from (f"- **check** `{c.name}`: `{c.sql}`" for c in declared.checks)
    yield from ("", "| column | type | required | PII | doc |", "|---|---|---|---|---|")
    schema = declared.schema()
    for column in declared.columns:
        field = schema.find_field(column.name)
        doc = column.doc if column.accepted is None else f"{column.doc}. One of: {_names(column.accepted)}"
        required = "yes" if field.required else ""
        yield f"| `{column.name}` | `{_cell(str(field.field_type))}` | {required} | {column.pii} | {_cell(doc)} |"


def _names(names: list[str]) -> str:
    return ", ".join(f"`{n}`" for n in names)


def _link(table: str) -> str:
    """A link to the table's section; GitHub drops the dot of a heading in its anchor."""
    return f"[{table}](#{table.replace('.', '')})"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
