"""Sabotage the pipeline one way at a time, and see `lakehouse verify` or the tests catch each: `make mutants`.

Each mutant is a change of text in a copy of the project. A mutant that nothing catches is a hole in the checks, and fails
the run. The world is small; what it cannot show (an event at the very second a plan changes), the tests must.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lakehouse.settings import ROOT

FOLDERS = ("audits", "catalog", "dags", "lakehouse", "simulator", "tests", "transforms", "writers")
WORLD = ("demo", "--customers", "120", "--days", "40", "--events", "30000", "--rounds", "4", "--json")
TESTS = (
    "tests/cases",
    "tests/properties",
    "tests/faults/test_commit.py",
    "tests/faults/test_deletes.py",
    "tests/integration/test_product_events.py",
)


@dataclass(frozen=True)
class Mutant:
    """One sabotage: in `file`, `old` becomes `new`; `means` says what that does to the data."""

    name: str
    file: str
    old: str
    new: str
    means: str


MUTANTS = (
    Mutant(
        "arrival-order",
        "transforms/billing/event_versions.py",
        "AS customer_id, created_at,\n",
        "AS customer_id, received_at AS created_at,\n",
        "billing states are ordered by arrival and not by event time",
    ),
    Mutant(
        "strict-created",
        "lakehouse/chains.py",
        "ordered = order_group(found, anchor)",
        "ordered = sorted(range(len(found)), key=lambda i: found[i].event_id)",
        "several events of one second are ordered by id, not by what they replaced",
    ),
    Mutant(
        "life-cycle-ignored",
        "lakehouse/chains.py",
        "return self.rank, self.progress, self.event_id",
        "return self.rank, (), self.event_id",
        "of events of one second that name no previous values the one with the greatest id is the last",
    ),
    Mutant(
        "late-keys-in-order",
        "lakehouse/heads.py",
        "f'WHERE k.first <= i.\"{build.time}\"'",
        "'WHERE false'",
        "a late event goes on from the last state of its object as if it came in order",
    ),
    Mutant(
        "one-a-second",
        "transforms/versions.py",
        "in_order = sequence_in_second(found, ",
        'in_order = sequence_in_second(found.unique([*KEYS, "created_at"]), ',
        "of several events in one second any one is kept",
    ),
    Mutant(
        "late-crm-dropped",
        "writers/crm.py",
        "last.filter(~(unchanged() | known_back))",
        'last.filter(~(unchanged() | known_back), pl.col("updated_at") - pl.col("effective_at") < pl.duration(hours=1))',
        "a CRM row that was entered late is dropped",
    ),
    Mutant(
        "crm-by-entry-time",
        "transforms/crm.py",
        ", effective_at, {silent}",
        ", updated_at AS effective_at, {silent}",
        "a mapping counts from when it was entered, not from when it took effect",
    ),
    Mutant(
        "closed-interval-end",
        "lakehouse/asof_engines.py",
        "(index.starts.gather(further - 1) <= at)",
        "(index.starts.gather(further - 1) < at)",
        "an event at the second of a change belongs to the plan before it",
    ),
    Mutant(
        "interval-end-ignored",
        "lakehouse/asof_engines.py",
        "pl.when(~expired).then(place)",
        "place",
        "the last interval counts also after its end",
    ),
    Mutant(
        "billing-not-deduplicated",
        "lakehouse/builds/inserts.py",
        "    if copies.num_rows:\n",
        "    if copies.num_rows and False:\n",
        "an event that is sent again in a later batch is stored again",
    ),
    Mutant(
        "product-not-deduplicated",
        "transforms/product/duplicates.py",
        "again = pl.concat([again, known])",
        "again = again.clone()",
        "a product event that comes again in a later batch is stored again",
    ),
    Mutant(
        "no-repair",
        "transforms/product/attribution.py",
        "if plan.base is None or (dirty.is_empty() and replaced.is_empty()):",
        "if True:",
        "late billing and late CRM rows do not correct the events already attributed",
    ),
    Mutant(
        "repair-from-arrival",
        "transforms/product/attribution.py",
        'new_rows("raw.crm_workspaces", "workspace_id, effective_at")',
        'new_rows("raw.crm_workspaces", "workspace_id, updated_at AS effective_at")',
        "a late mapping corrects only what happened after it was entered",
    ),
    Mutant(
        "one-of-several",
        "transforms/product/attribution.py",
        'pl.when((pl.col("__workspaces") > 1) | (pl.col("customers") > 1))',
        "pl.when(pl.lit(value=False))",
        "that a user or a workspace belonged to several at once is not told from belonging to none",
    ),
    Mutant(
        "membership-of-today",
        "transforms/product/attribution.py",
        "LEFT JOIN __dirty_users u ON e.workspace_id IS NULL AND ",
        "LEFT JOIN __dirty_users u ON false AND ",
        "a late membership does not correct the events already attributed",
    ),
    Mutant(
        "logins-correct-nothing",
        "transforms/product/attribution.py",
        "LEFT JOIN __dirty_anonymous a ON e.workspace_id IS NULL AND ",
        "LEFT JOIN __dirty_anonymous a ON false AND ",
        "an identify event does not correct what its device did before",
    ),
    Mutant(
        "second-mapping-is-a-move",
        "transforms/billing/workspace_customer_history.py",
        """("workspace_id", "coalesce(mapping_id, '') AS mapping")""",
        """("workspace_id",)""",
        "a workspace that two rows of the CRM give to two customers belongs to the one entered last",
    ),
    Mutant(
        "identity-from-now-on",
        "transforms/product/attribution.py",
        'pl.when(first).then(pl.col("valid_from") - lookback)',
        'pl.when(first).then(pl.col("valid_from"))',
        "what a device did before its user logged in belongs to nobody",
    ),
    Mutant(
        "test-mode-stored",
        "transforms/versions.py",
        "WHERE object_type = {text(object_type)} AND livemode",
        "WHERE object_type = {text(object_type)}",
        "test-mode events mix with live ones",
    ),
    Mutant(
        "lower-plan-wins",
        "transforms/billing/plan_timeline.sql",
        "coalesce(i.plan_rank, 0) DESC",
        "coalesce(i.plan_rank, 0)",
        "of two subscriptions the lower plan is in force",
    ),
    Mutant(
        "status-ignored",
        "transforms/billing/plan_timeline.sql",
        "ORDER BY i.preference, ",
        "ORDER BY ",
        "of two subscriptions a canceled one can be in force",
    ),
    Mutant(
        "no-reversals",
        "lakehouse/ledger.py",
        'reversed_ = runs.filter(pl.col("__until") < pl.col("__last"))',
        'reversed_ = runs.filter(pl.col("__until") < 0)',
        "an entry that turns out wrong is not taken back",
    ),
    Mutant(
        "refunds-told-twice",
        "transforms/postings.sql",
        "greatest(0, e.amount_refunded_minor - (e.amount_minor - e.captured_minor) - coalesce(sum(r.amount_minor), 0))",
        "e.amount_refunded_minor",
        "a refund counts once by its own event and once by its charge's total",
    ),
    Mutant(
        "closed-days-move",
        "transforms/billing/revenue_ledger.py",
        "n.recorded_at - to_hours($close_after_hours)",
        "n.booked_at - to_hours($close_after_hours)",
        "what is learnt late is posted to a day that is closed",
    ),
    Mutant(
        "failed-refunds-forgotten",
        "transforms/marts/revenue_daily.sql",
        "IN ('refund', 'refund_failed', 'refund_canceled')",
        "IN ('refund')",
        "a refund that the bank sends back stays a refund in the daily revenue",
    ),
    Mutant(
        "movements-a-day-on",
        "transforms/marts/mrr_movements.sql",
        "date_trunc('month', movement_date)",
        "date_trunc('month', movement_date + INTERVAL 1 DAY)",
        "what happens to MRR on the last day of a month counts in the next one",
    ),
    Mutant(
        "arpa-at-the-beginning",
        "transforms/marts/arpa_by_cohort.sql",
        "v.movement_date < m.month + INTERVAL 1 MONTH",
        "v.movement_date <= m.month",
        "average revenue is that of the beginning of a month, not of its end",
    ),
    Mutant(
        "upgrades-within-two-days",
        "transforms/marts/upgrade_exposures.sql",
        "INTERVAL 1 DAY * f.window_days",
        "INTERVAL 2 DAY",
        "an upgrade counts for the funnel only within two days after the use",
    ),
    Mutant(
        "attempts-are-use",
        "transforms/marts/delinquent_feature_usage.sql",
        " AND e.event_name <> 'feature_attempted'",
        "",
        "who does not pay and tries a feature in vain counts as having used it",
    ),
    Mutant(
        "unpaid-bills-are-none",
        "transforms/marts/usage_vs_billed.sql",
        "i.status IN ('open', 'paid', 'uncollectible')",
        "i.status = 'paid'",
        "use that was invoiced and is not paid yet counts as leaked",
    ),
    Mutant(
        "first-owner-of-the-day",
        "transforms/marts/workspace_engagement_daily.sql",
        "ORDER BY occurred_at DESC, event_id DESC",
        "ORDER BY occurred_at, event_id",
        "a workspace that changes hands belongs to its first owner all day",
    ),
    Mutant(
        "dead-letters-lost",
        "lakehouse/dead_letters.py",
        "if rejected.num_rows == 0:",
        "if True:",
        "records that cannot be used vanish",
    ),
    Mutant(
        "merge-keeps-old-rows",
        "lakehouse/builds/merges.py",
        "    return Staged([*add.files(), *deletes], remove,",
        "    return Staged(add.files(), [],",
        "a merge adds the new rows of a key and leaves the old ones",
    ),
    Mutant(
        "no-fence",
        "lakehouse/commit.py",
        "        _refuse_fenced(name, table.metadata, change.consumer, expected, change.reached)\n",
        "",
        "a zombie's append of offsets that are there already succeeds",
    ),
    Mutant(
        "no-scope-check",
        "lakehouse/commit.py",
        "        if change.rewrite:\n",
        "        if change.rewrite and False:\n",
        "two rewrites planned on the same base both commit",
    ),
    Mutant(
        "deletes-come-back",
        "lakehouse/commit.py",
        "                _refuse_other_deletes(name, table, change)\n",
        "",
        "a compaction brings rows back that were deleted while it ran",
    ),
    Mutant(
        "deletes-not-read",
        "lakehouse/live.py",
        "LiveFile.of(e, deleted.get(e.data_file.file_path, ()))",
        "LiveFile.of(e)",
        "intervals that a late event has split are read beside those that replaced them",
    ),
    Mutant(
        "lost-answer-is-a-no",
        "lakehouse/publish.py",
        "        if landed():\n            return sent\n",
        "",
        "a commit whose answer was lost is not recognised",
    ),
)


def make_copy(folder: Path) -> None:
    """Copy the project's code, without its git history and environment."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def sabotage(folder: Path, mutant: Mutant) -> None:
    """Apply a mutant to a copy.

    Raises:
        ValueError: its text is not there exactly once; the code has moved on and the mutant must follow.
    """
    path = folder / mutant.file
    text = path.read_text("utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(f"mutant {mutant.name}: its text stands {text.count(mutant.old)} times in {mutant.file}, not once")
    path.write_text(text.replace(mutant.old, mutant.new), "utf-8")


def caught_by(folder: Path, world: Sequence[str] = WORLD) -> str | None:
    """What notices the sabotage in a demo with the arguments `world`: `verify`, `tests`, or None."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LAKEHOUSE_")}
    environment |= {"PYTHONPATH": str(folder), "LAKEHOUSE_HOME": str(folder / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    run = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    demo = subprocess.run(
        [sys.executable, "-c", "from lakehouse.cli import main; main()", *world], timeout=900, check=False, **run
    )
    if demo.returncode:
        return "verify" if demo.returncode == 3 else f"demo (exit {demo.returncode})"
    tests = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", *TESTS], timeout=900, check=False, **run)
    return "tests" if tests.returncode == 1 else None


def main() -> int:
    """Run the mutants named (default: all) and print who caught each; 1 if one survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="mutants to run (default: all)")
    names = parser.parse_args().names
    survivors = []
    for mutant in MUTANTS:
        if names and mutant.name not in names:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutant-") as place:
            make_copy(Path(place))
            sabotage(Path(place), mutant)
            catcher = caught_by(Path(place))
        if catcher is None:
            survivors.append(mutant.name)
        verdict = f"caught by {catcher}" if catcher else "SURVIVED"
        print(f"{mutant.name:26} {verdict:18} {time.monotonic() - started:5.0f} s   {mutant.means}", flush=True)
    print(f"{len(survivors)} survived" + (f": {', '.join(survivors)}" if survivors else ""))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
