"""Append-only ledgers: what a book of postings looks like when it is written down in the order in which facts were learnt.

What should stand in the books is a pure function of the facts known (`postings`). This module turns that function, given
after each step of learning, into entries that are never changed: a posting that appears is an entry; one that changes is a
reversal and a new entry; one that vanishes is a reversal. So the entries recorded up to a time are exactly what the same
function gives for the facts known by then, and summing them needs no "latest version" logic.

`fold` is a pure function over any frame, independent of Stripe; `read` answers for the table that catalog/reference/ledger.yaml
names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal
from zoneinfo import ZoneInfo

import polars as pl

from lakehouse.completeness import received_until
from lakehouse.dead_letters import replaying_since
from lakehouse.declarations import load_reference
from lakehouse.errors import Terminal, UsageError
from lakehouse.lake import Lake
from lakehouse.queries import query

STEP, REVERSES = "step", "reverses_step"


def fold(
    postings: pl.DataFrame, steps: pl.DataFrame, *, group: Sequence[str], key: Sequence[str], fields: Sequence[str]
) -> pl.DataFrame:
    """The entries that a bookkeeper would have written, learning the facts of each group step by step.

    Args:
        postings: what should stand in the books of a group after each of its steps: columns group, `step`, key, fields; at
            most one row for each (group, step, key).
        steps: the steps of each group, numbered 1, 2, ... without a gap: columns group, `step`.
        key: names a posting inside its group; fields: what it says (amount, days, ...). NULL equals NULL.

    Returns:
        One row an entry: group, `step` (at which it is written), key, fields, and `reverses_step`: NULL for a new entry; for a
        reversal, the step at which the entry it takes back was written (the fields are those of that entry: the caller
        negates amounts). Sorted by group, key, step, reversals first. The net of the entries up to step n is exactly the
        postings at step n.

    Raises:
        Terminal: a posting comes twice at one step, or names a step that its group does not have.
    """
    within = [*group, *key]
    if doubled := int(postings.select(*within, STEP).is_duplicated().sum()):
        raise Terminal(f"ledger: {doubled} postings share one key ({', '.join(key)}) at one step")
    last = steps.group_by(list(group)).agg(pl.col(STEP).max().alias("__last"))
    if unknown := postings.join(steps, on=[*group, STEP], how="anti", nulls_equal=True).height:
        raise Terminal(f"ledger: {unknown} postings name a step that their group does not have")
    ordered = postings.select(*within, STEP, *fields).sort(*within, STEP)
    same_posting = pl.all_horizontal(
        [pl.col(c).eq_missing(pl.col(c).shift()) for c in (*within, *fields)] + [pl.col(STEP) == pl.col(STEP).shift() + 1]
    )
    runs = (
        ordered.with_columns((~same_posting).fill_null(value=True).cum_sum().alias("__run"))
        .group_by("__run", maintain_order=True)
        .agg(*(pl.col(c).first() for c in (*within, *fields)), pl.col(STEP).first(), pl.col(STEP).last().alias("__until"))
        .join(last, on=list(group), how="left", nulls_equal=True, maintain_order="left")
    )
    step_type = postings.schema[STEP]
    written = runs.select(*within, STEP, *fields, pl.lit(None, step_type).alias(REVERSES))
    reversed_ = runs.filter(pl.col("__until") < pl.col("__last")).select(
        *within, (pl.col("__until") + 1).alias(STEP), *fields, pl.col(STEP).alias(REVERSES)
    )
    return pl.concat([written, reversed_]).sort([*within, STEP, REVERSES], nulls_last=True)


Reading = Literal["booked", "restated", "as-known"]
Grain = Literal["day", "month", "type"]


@dataclass(frozen=True)
class Rule:
    """catalog/reference/ledger.yaml: the table that holds the books, and when a day of which zone is closed."""

    table: str
    time_zone: str
    close_after_hours: int
    clock: str
    settle_seconds: int

    def closes_at(self, day: date) -> datetime:
        """When `day` is closed: what is learnt from then on is posted to a later day."""
        end = datetime.combine(day + timedelta(days=1), time(), ZoneInfo(self.time_zone))
        return end.astimezone(UTC) + timedelta(hours=self.close_after_hours)


def ledger_rule(lake: Lake) -> Rule:
    """The rule of the lake's books."""
    return Rule(**load_reference(lake.settings.catalog_dir, "ledger")[0])


def known_until(lake: Lake, rule: Rule) -> datetime | None:
    """Up to when the books know everything that was received: no entry recorded before can still come. None: they are empty.

    lakehouse/completeness.py says how far that is; what a replay that has not ended brings holds it back too.
    """
    if not lake.exists(rule.table):
        return None
    known = received_until(lake, rule.clock, lake.vector(rule.table), rule.settle_seconds)
    # what a replay that has not ended brings is recorded when it began
    replaying = replaying_since(lake)
    return min(known, replaying - timedelta(microseconds=1)) if known and replaying else known


READ = """
SELECT {period}, basis, currency{type}, CAST(sum(amount_minor) AS BIGINT) AS amount_minor,
    CAST(sum(tax_minor) AS BIGINT) AS tax_minor, count(*) AS entries
FROM (SELECT *, {day} AS "day" FROM {table})
WHERE basis IN ($one_basis, $other_basis) AND recorded_at <= $at
    AND (CAST($first AS DATE) IS NULL OR "day" BETWEEN CAST($first AS DATE) AND CAST($last AS DATE))
GROUP BY ALL
ORDER BY ALL
"""
PERIODS = {"day": '"day"', "month": 'strftime("day", \'%Y-%m\') AS "month"', "type": 'strftime("day", \'%Y-%m\') AS "month"'}
END_OF_TIME = datetime(9999, 1, 1, tzinfo=UTC)


def read(
    lake: Lake,
    reading: Reading,
    *,
    basis: Literal["billed", "cash"] | None = None,
    month: tuple[int, int] | None = None,
    at: datetime | None = None,
    grain: Grain = "month",
) -> dict[str, Any]:
    """One reading of the books, in sums by period, basis and currency (never across these).

    booked: each entry on its posting day; a closed day never moves again. restated: each on the day whose revenue it changes
    (NULL: not known yet). as-known: restated from the entries recorded up to `at`; `at` does the same to `booked`.

    Returns:
        {"reading", "at", "known_until", "time_zone", "rows": [{day or month, basis, currency, entry_type (grain type),
        amount_minor, tax_minor, entries, closed (booked: no entry can be added to the period)}]}.

    Raises:
        UsageError: `at` is later than what the books know for sure, or as-known without `at`, or there are no books yet.
    """
    rule = ledger_rule(lake)
    known = known_until(lake, rule)
    if known is None:
        raise UsageError(f"{rule.table} holds nothing yet; fill it: lakehouse run {rule.table}")
    if reading == "as-known" and at is None:
        raise UsageError(f"as known when? --at TIME, up to {known.isoformat()}")
    if at is not None and at > known:
        raise UsageError(
            f"{at.isoformat()} is later than what the books know for sure, {known.isoformat()}: a record received by then may "
            "still be on its way, and the answer would change. Bring them up to date: lakehouse ingest && lakehouse run"
        )
    zone = rule.time_zone
    day = "posting_date" if reading == "booked" else f"CAST(timezone('{zone}', effective_at) AS DATE)"
    first = date(*month, 1) if month else None
    last = (first + timedelta(days=31)).replace(day=1) - timedelta(days=1) if first else None
    text = READ.format(period=PERIODS[grain], day=day, table=rule.table, type=", entry_type" if grain == "type" else "")
    found = query(
        lake,
        text,
        parameters={
            "one_basis": basis or "billed", "other_basis": basis or "cash", "at": at or END_OF_TIME, "first": first, "last": last,
        },
    )  # fmt: skip
    rows = found.to_pylist()
    for row in rows:
        if reading == "booked":
            row["closed"] = (at or known) >= rule.closes_at(_last_day(row))
        if isinstance(row.get("day"), date):
            row["day"] = row["day"].isoformat()
    return {"reading": reading, "at": at, "known_until": known, "time_zone": zone, "rows": rows}


def _last_day(row: dict[str, Any]) -> date:
    if "day" in row:
        return row["day"]  # type: ignore[no-any-return]
    first = date.fromisoformat(row["month"] + "-01")
    return (first + timedelta(days=31)).replace(day=1) - timedelta(days=1)
