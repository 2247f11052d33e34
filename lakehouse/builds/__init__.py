"""How a table is built, by the `mode` of its declaration: from a plan to staged files that a commit can name."""

from __future__ import annotations

from collections.abc import Callable

from pyiceberg.expressions import AlwaysTrue

from lakehouse.builds.by_period import periods
from lakehouse.builds.histories import history
from lakehouse.builds.inserts import insert
from lakehouse.builds.merges import merge
from lakehouse.plans import Plan, Staged, live_files
from lakehouse.staging import stage


def _replace(plan: Plan) -> Staged:
    """Replace the whole content by what the transform makes of its inputs at the cut."""
    plan.bind(plan.transform.inputs)
    rows = plan.transform.build(plan.inputs()).rows
    remove = live_files(plan, AlwaysTrue())
    return Staged(stage(plan.table, plan.declared, rows), remove, rows=rows.num_rows)


def _custom(plan: Plan) -> Staged:
    """The transform plans its own files: its module has `plan(plan) -> Staged`."""
    return plan.transform.module.plan(plan)  # type: ignore[union-attr, no-any-return]


BUILDERS: dict[str, Callable[[Plan], Staged]] = {
    "insert": insert,
    "merge": merge,
    "history": history,
    "periods": periods,
    "replace": _replace,
    "custom": _custom,
}
