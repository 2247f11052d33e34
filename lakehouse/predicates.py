"""Iceberg row filters for scans. pyiceberg's expression classes take columns by name, but their types do not say so."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime
from functools import reduce
from typing import Any

from pyiceberg.expressions import (
    AlwaysFalse,
    AlwaysTrue,
    And,
    BooleanExpression,
    EqualTo,
    GreaterThanOrEqual,
    In,
    IsNull,
    LessThan,
    LessThanOrEqual,
    Or,
)


def _literal(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def equal(column: str, value: Any) -> BooleanExpression:
    """column = value."""
    return EqualTo(column, _literal(value))  # type: ignore[arg-type, call-arg]


def at_least(column: str, value: Any) -> BooleanExpression:
    """column >= value."""
    return GreaterThanOrEqual(column, _literal(value))  # type: ignore[arg-type, call-arg]


def at_most(column: str, value: Any) -> BooleanExpression:
    """column <= value."""
    return LessThanOrEqual(column, _literal(value))  # type: ignore[arg-type, call-arg]


def below(column: str, value: Any) -> BooleanExpression:
    """column < value."""
    return LessThan(column, _literal(value))  # type: ignore[arg-type, call-arg]


def one_of(column: str, values: Collection[Any]) -> BooleanExpression:
    """column IN values (none: matches nothing). NULL among the values is left out: it equals nothing."""
    return In(column, {v for v in values if v is not None})  # type: ignore[arg-type, call-arg]


def is_null(column: str) -> BooleanExpression:
    """Column IS NULL."""
    return IsNull(column)  # type: ignore[arg-type, call-arg]


def all_of(parts: Iterable[BooleanExpression]) -> BooleanExpression:
    """All hold; of nothing, true."""
    return reduce(And, parts, AlwaysTrue())  # type: ignore[arg-type]


def any_of(parts: Iterable[BooleanExpression]) -> BooleanExpression:
    """One holds; of nothing, false."""
    return reduce(Or, parts, AlwaysFalse())  # type: ignore[arg-type]
