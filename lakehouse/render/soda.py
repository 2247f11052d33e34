"""A Soda v4 contract from a declaration: the rules that staged files are held to, checked again on the published table."""

from __future__ import annotations

from typing import Any

import yaml

from lakehouse.declarations import Check, Column, Declaration
from lakehouse.errors import DeclarationError

DATA_SOURCE = "lakehouse"


class _Quoted(str):
    """A string that keeps its quotes: Soda reads YAML 1.2, in which other plain words are numbers than in PyYAML's 1.1."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):
    """SafeDumper that knows _Quoted and repeats values instead of naming them by anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the signature is PyYAML's
        return True


_Dumper.add_representer(_Quoted, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style='"'))


def render_soda_contract(declaration: Declaration) -> str:
    """The contract of one table (YAML); its checks bear the names that lakehouse.checks gives the same rules.

    A table that writers fill and that promises freshness must have rows: its source does not rest. What is made from it may
    be empty and right: a company without credit notes, a mart before its first full window.

    Raises:
        DeclarationError: a check holds `${`.
    """
    keys = ", ".join(f'"{c}"' for c in declaration.primary_key)
    least = 1 if declaration.build.mode == "append" and declaration.freshness_minutes is not None else 0
    # Soda tells two checks of one type on one column apart by their qualifier alone
    checks: list[dict[str, Any]] = [
        {"row_count": {"name": "row_count", "threshold": {"must_be_greater_than_or_equal": least}}},
        {"duplicate": {"name": f"unique({keys})", "columns": declaration.primary_key}},
    ]
    checks += [
        {"failed_rows": {"name": c.name, "qualifier": c.name, "expression": _expression(declaration, c)}}
        for c in declaration.checks
    ]
    contract = {
        "dataset": f"{DATA_SOURCE}/{declaration.layer}/{declaration.name}",
        "description": declaration.doc,
        "columns": [_column(declaration, c) for c in declaration.columns],
        "checks": checks,
    }
    return yaml.dump(contract, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _column(declaration: Declaration, column: Column) -> dict[str, Any]:
    checks: list[dict[str, Any]] = []
    if column.required or column.name in declaration.primary_key:
        checks.append({"missing": {"name": f"not_null({column.name})"}})
    if column.accepted is not None:
        values = [_Quoted(v) for v in column.accepted]
        checks.append({"invalid": {"name": f"accepted({column.name})", "valid_values": values}})
    found: dict[str, Any] = {"name": _Quoted(column.name), "description": column.doc}
    return found | ({"checks": checks} if checks else {})


def _expression(declaration: Declaration, check: Check) -> str:
    """True for the rows that break the rule; NULL breaks it too."""
    if "${" in check.sql:
        raise DeclarationError(
            f"{declaration.path}: check {check.name!r} holds `${{`, which Soda takes for a variable of its own"
        )
    return f"({check.sql}) IS NOT TRUE"
