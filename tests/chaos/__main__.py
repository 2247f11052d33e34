"""`python -m tests.chaos`: seeded rounds of faults over the Iceberg catalogs, and a report. See docs/faults.md, or --help."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

from lakehouse.failpoints import PLACES
from lakehouse.lake import code_version
from lakehouse.local import Kind
from lakehouse.local.kafka import VERSION, KafkaBroker, why_unavailable
from tests.chaos.rounds import Outcome, Round
from tests.chaos.scene import scene

KINDS: tuple[Kind, ...] = get_args(Kind)
ENOUGH = 5
EXIT_FINE, EXIT_FAILED, EXIT_USAGE, EXIT_WRONG = 0, 1, 2, 3


def run(
    kinds: Sequence[Kind],
    numbers: Sequence[int],
    seed: int,
    folder: Path,
    kafka: KafkaBroker,
    records: int = 20_000,
    seconds: float = 5.0,
    told: Callable[[Outcome], None] = lambda _: None,
    sabotage: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Play rounds `numbers` on each catalog; `told` of each as it ends.

    Returns:
        The report: what was injected, and what was lost or doubled, in all, by catalog and by round.
    """
    began = time.monotonic()
    outcomes: list[Outcome] = []
    renewed = 0
    for kind in kinds:
        with scene(kind, folder / kind, kafka) as stage:
            for number in numbers:
                outcome = Round(stage, seed, number, records, seconds, sabotage).play()
                if outcome.error and not kafka.coordinates_groups():
                    renewed += 1  # a defect of the broker, which no writer can do anything about: the round is played again
                    kafka.renew()
                    outcome = Round(stage, seed, number, records, seconds, sabotage).play()
                outcomes.append(outcome)
                told(outcome)
        if all(o.clean for o in outcomes if o.catalog == kind):
            shutil.rmtree(folder / kind)
    return report(outcomes, seed, time.monotonic() - began) | {"brokers_renewed": renewed}


def report(outcomes: Sequence[Outcome], seed: int, seconds: float) -> dict[str, Any]:
    """What a run comes to. `rare`: failpoints that came less than 5 times on a catalog."""
    by_catalog = {}
    for kind in dict.fromkeys(o.catalog for o in outcomes):
        mine = [o for o in outcomes if o.catalog == kind]
        places: Counter[str] = Counter()
        for outcome in mine:
            for hit, n in outcome.failpoints.items():
                places[hit.split()[0]] += n
        by_catalog[kind] = {
            "rounds": len(mine),
            "records": sum(o.records for o in mine),
            **_wrong(mine),
            "faults": dict(sorted(_total(mine, "faults").items())),
            "failpoints": {place: places[place] for place in PLACES},
            "failpoint_actions": dict(sorted(_total(mine, "failpoints").items())),
            "rare": [place for place in PLACES if places[place] < ENOUGH],
            "exits": dict(_total(mine, "exits").most_common()),
        }
    return {
        "code_version": code_version(),
        "kafka": VERSION,
        "seed": seed,
        "seconds": round(seconds, 1),
        "rounds": len(outcomes),
        "records": sum(o.records for o in outcomes),
        **_wrong(outcomes),
        "catalogs": by_catalog,
        "failing": [vars(o) for o in outcomes if not o.clean],
        "each": [{"seed": o.seed, "seconds": o.seconds, "faults": sum(o.faults.values()), "clean": o.clean} for o in outcomes],
    }


def _total(outcomes: Sequence[Outcome], name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total.update(getattr(outcome, name))
    return total


def _wrong(outcomes: Sequence[Outcome]) -> dict[str, int]:
    kinds = ("lost", "doubled", "unexpected", "changed", "broken")
    return {k: sum(o.verdict.get(k, 0) for o in outcomes) for k in kinds} | {"not_judged": sum(bool(o.error) for o in outcomes)}


def main() -> int:
    """Parse the command line, run, print; 0: nothing lost or doubled, 1: a round could not be judged, 3: something was."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds on each catalog (default: %(default)s)")
    parser.add_argument("--only", type=int, help="replay this one round")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same faults (default: %(default)s)")
    parser.add_argument("--catalog", default=",".join(KINDS), help="which of %(default)s")
    parser.add_argument("--records", type=int, default=20_000, help="records of a round (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long a round's faults last (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="emptied, and filled with what failing rounds leave (default: a temporary folder)"
    )
    parser.add_argument("--report", type=Path, help="write the report to this file")
    parser.add_argument("--json", action="store_true", help="print the report to stdout")
    asked = parser.parse_args()
    kinds = asked.catalog.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no such catalog: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if reason := why_unavailable():
        print(f"error: chaos runs on Apache Kafka alone. {reason}", file=sys.stderr)
        return EXIT_USAGE
    with ExitStack() as stack:
        if asked.folder:
            shutil.rmtree(asked.folder, ignore_errors=True)
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        kafka = stack.enter_context(KafkaBroker(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kafka-")))))
        numbers = [asked.only] if asked.only is not None else range(asked.rounds)
        made = run(kinds, numbers, asked.seed, folder.absolute(), kafka, asked.records, asked.seconds, tell)
        if asked.report:
            asked.report.parent.mkdir(parents=True, exist_ok=True)
            asked.report.write_text(json.dumps(made, indent=1), "utf-8")
        if asked.json:
            print(json.dumps(made, indent=1))
        else:
            summarise(made)
    if any(made[k] for k in ("lost", "doubled", "unexpected", "changed", "broken")):
        return EXIT_WRONG
    return EXIT_FAILED if made["not_judged"] else EXIT_FINE


def tell(outcome: Outcome) -> None:
    """A line of progress."""
    verdict = outcome.verdict
    what = outcome.error or f"{verdict['lost']} lost, {verdict['doubled']} doubled" + ("" if outcome.clean else f" {verdict}")
    faults = sum(outcome.faults.values()) + sum(outcome.failpoints.values())
    print(f"{outcome.seed}: {outcome.records:,} records, {faults} faults, {what} ({outcome.seconds:.1f} s)", file=sys.stderr)


def summarise(made: dict[str, Any]) -> None:
    """The report as a table, which is Markdown; and how to replay what failed."""
    catalogs = made["catalogs"]

    def line(name: str, figures: Sequence[object]) -> None:
        print(f"| {name:<28} | {' | '.join(f'{figure:>9}' for figure in figures)} |")

    line("", list(catalogs))
    line("---", ["---:"] * len(catalogs))
    for name in ("rounds", "records", "lost", "doubled", "unexpected", "changed", "not_judged"):
        line(name.replace("_", " "), [f"{mine[name]:,}" for mine in catalogs.values()])
    for section, prefix in (("failpoints", "failpoint "), ("faults", "")):
        for name in dict.fromkeys(name for mine in catalogs.values() for name in mine[section]):
            line(prefix + name.replace("_", " "), [f"{mine[section].get(name, 0):,}" for mine in catalogs.values()])
    if rare := {kind: mine["rare"] for kind, mine in catalogs.items() if mine["rare"]}:
        print(f"\nfailpoints that came less than {ENOUGH} times (more rounds: ROUNDS=): {rare}")
    for failing in made["failing"]:
        seed, kind, number = failing["seed"].split("/")
        print(f"\n{failing['error'] or failing['verdict']}\nreplay: make chaos SEED={seed} CATALOG={kind} ONLY={number}")


if __name__ == "__main__":
    sys.exit(main())
