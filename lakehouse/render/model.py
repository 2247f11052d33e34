"""The data model, in Markdown: every table's grain and key, and a diagram of which table is made from which, as declared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lakehouse.declarations import LAYERS, Declaration
from lakehouse.transforms import Transform, upstream


def render_model(declarations: Mapping[str, Declaration], transforms: Mapping[str, Transform]) -> str:
    """A diagram, then a table a layer: grain, key, what a row belongs to by its key, what it is made from."""
    lines = [
        "# Data model",
        "",
        "Rendered from `catalog/` and the transforms; change those, not this page. Columns: [data dictionary]",
    ]
    lines[-1] += "(data-dictionary.md)."
    lines += ["", "An arrow goes from a table to one that is made from it.", "", "```mermaid", "flowchart LR"]
    for layer in LAYERS:
        inside = [d for d in declarations.values() if d.layer == layer]
        lines += [f"  subgraph {layer}", *(f"    {_node(d.table)}[{d.name}]" for d in inside), "  end"]
    lines += [f"  {_node(source)} --> {_node(name)}" for name, source in _edges(declarations, transforms)]
    lines.append("```")
    for layer in LAYERS:
        lines += ["", f"## {layer}", "", "| table | grain | key | refers to | made from |", "|---|---|---|---|---|"]
        for declared in (d for d in declarations.values() if d.layer == layer):
            made = upstream(declared, transforms[declared.table]) if declared.table in transforms else ()
            cells = [
                f"[{declared.name}](data-dictionary.md#{declared.table.replace('.', '')})",
                " ".join(declared.grain.split()),
                _names(declared.primary_key),
                _names(sorted(_refers_to(declared, declarations))),
                _names(made) or "its source",
            ]
            lines.append(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |")
    return "\n".join(lines) + "\n"


def _edges(declarations: Mapping[str, Declaration], transforms: Mapping[str, Transform]) -> Iterator[tuple[str, str]]:
    for name, declared in declarations.items():
        if name in transforms:
            yield from ((name, source) for source in upstream(declared, transforms[name]))


def _refers_to(declared: Declaration, declarations: Mapping[str, Declaration]) -> Iterator[str]:
    """Tables whose whole key this table holds, beside its own; that two histories begin at one time relates nothing."""
    for other in declarations.values():
        key = set(other.primary_key)
        ids = {c for c in key if c.endswith("_id")}
        if (
            ids
            and "valid_from" not in key
            and other is not declared
            and key <= set(declared.column_names)
            and not ids >= set(declared.primary_key)
        ):
            yield other.table


def _node(table: str) -> str:
    return table.replace(".", "_")


def _names(names: object) -> str:
    return ", ".join(f"`{n}`" for n in names)  # type: ignore[attr-defined]
