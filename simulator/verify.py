"""Compare a lake with the truth of the world it was fed from. The lake is only asked questions, by SQL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from simulator.attribution import AMBIGUOUS
from simulator.cells import Compared, compare
from simulator.marts import KEYS, funnel

BILLED = ("subscription_id", "plan", "billing_status")
Query = Callable[[str], pa.Table]

ACCURACY_WANTED = 0.999

EVENT = ("event_id", "attributed_workspace_id", "workspace_source", "identified_user_id", "attribution", "customer_id")
EVENTS = f"SELECT {', '.join((*EVENT, *BILLED))} FROM product.events"
VERSIONS = "SELECT event_id FROM billing.event_versions WHERE livemode AND NOT nested"
HISTORY = """
SELECT subscription_id, customer_id, status, billing_status, price_id, plan, quantity, cancel_at_period_end,
       collection_paused, valid_from, valid_to
FROM billing.subscription_history
"""
TIMELINE = "SELECT customer_id, subscription_id, plan, price_id, billing_status, valid_from, valid_to FROM billing.plan_timeline"
# an entry and its reversal are nothing; what is left must have happened, to the minor unit
REVENUE = """
SELECT basis, entry_type, object_id, origin_id, customer_id, currency, sum(amount_minor)::BIGINT AS amount_minor,
       booked_at, effective_at
FROM billing.revenue_ledger
GROUP BY basis, entry_type, object_id, origin_id, customer_id, currency, booked_at, effective_at
HAVING sum(amount_minor) <> 0
"""
STATES = """
SELECT 'invoice' AS object_type, invoice_id AS object_id, status, amount_paid_minor AS amount_minor FROM billing.invoices
UNION ALL SELECT 'payment_intent', payment_intent_id, status, amount_received_minor FROM billing.payment_intents
UNION ALL SELECT 'charge', charge_id, status, amount_refunded_minor FROM billing.charges
UNION ALL SELECT 'refund', refund_id, status, amount_minor FROM billing.refunds
UNION ALL SELECT 'dispute', dispute_id, status, amount_minor FROM billing.disputes
"""
MRR = "SELECT customer_id, currency, movement_date, movement, before_minor, after_minor FROM billing.mrr_movements"
MARTS = {name: f"SELECT * FROM marts.{name}" for name in KEYS}
FUNNEL = "SELECT * FROM marts.upgrade_funnel"
# after its end a day of exposures waits 7 days for the upgrade, and 3 for the use
EXPOSURES_AWAITED = timedelta(days=10)
RAW = """
SELECT (SELECT count(*) FROM raw.product_events) AS product_events, (SELECT count(*) FROM raw.stripe_events) AS stripe_events
"""
DEAD = "SELECT consumer, count(*) AS records FROM ops.dead_letters GROUP BY consumer"


def verify(folder: Path, query: Query) -> dict[str, Any]:
    """What the lake holds against what is true, in counts; `problems` says in words what differs.

    folder: of the world, with its `truth`. Accuracy counts every unique event: one that is missing is wrong, and so is one
    whose outcome, plan, billing status, customer or subscription is not the true one.
    """
    truth = folder / "truth"
    told = json.loads((truth / "truth.json").read_text("utf-8"))
    raw = query(RAW).to_pylist()[0]
    dead = {row["consumer"]: row["records"] for row in query(DEAD).to_pylist()}

    events = pl.read_parquet(truth / "product_events.parquet").rename({"stripe_customer_id": "customer_id"})
    stored = pl.DataFrame(query(EVENTS))
    product = _compare_ids(events["event_id"], stored["event_id"])
    attribution = compare_attribution(events, stored)

    stripe = pl.read_parquet(truth / "stripe_events.parquet").filter(
        pl.col("livemode") & pl.col("object_type").is_in(told["stripe_events"]["known_objects"])
    )
    versions = _compare_ids(stripe["event_id"], pl.DataFrame(query(VERSIONS))["event_id"])

    history = pl.read_parquet(truth / "subscription_history.parquet").rename(
        {"stripe_customer_id": "customer_id", "pause_collection": "collection_paused"}
    )
    timeline = pl.read_parquet(truth / "plan_timeline.parquet").rename({"stripe_customer_id": "customer_id"})
    money = pl.read_parquet(truth / "revenue.parquet")
    movements = pl.read_parquet(truth / "mrr_movements.parquet")
    states = pl.read_parquet(truth / "object_states.parquet")
    found: dict[str, Any] = {
        "product_events": {
            "sent": told["product_events"]["sent"],
            **product,
            "dead_letters": dead.get("product.events", 0),
            "malformed": told["product_events"]["malformed"],
            "raw_records": raw["product_events"],
        },
        "stripe_events": {
            "sent": told["stripe_events"]["sent"],
            **versions,
            "dead_letters": dead.get("billing.event_versions", 0),
            "raw_records": raw["stripe_events"],
        },
        "attribution": attribution,
        "identity": compare_identity(events, stored),
        "subscription_history": compare_intervals(history, pl.DataFrame(query(HISTORY))),
        # the lake's timeline also breaks where seats change, which the truth does not tell
        "plan_timeline": compare_intervals(timeline, coalesce(pl.DataFrame(query(TIMELINE)), "customer_id")),
        "object_states": _renamed(compare_intervals(states, pl.DataFrame(query(STATES))), "objects"),
        "revenue_ledger": compare_money(money, pl.DataFrame(query(REVENUE))),
        "mrr_movements": _renamed(compare_intervals(movements, pl.DataFrame(query(MRR))), "movements"),
    }
    compared = compare_marts(truth, told, query)
    found |= {name: {"rows": c.rows, "stored": c.stored, "wrong": c.wrong} for name, c in compared.items()}
    return found | {"problems": _problems(found) + [_tell(name, c) for name, c in compared.items() if c.wrong]}


def first_attribution(folder: Path, first_written: Callable[[str, Sequence[str]], Iterable[pa.Table]]) -> dict[str, Any]:
    """How right the attribution of the events was when they were first written, before later knowledge repaired it.

    first_written: (table, columns) -> its rows as first written, in that order; of an event that comes again the first counts.
    """
    events = pl.read_parquet(folder / "truth" / "product_events.parquet").rename({"stripe_customer_id": "customer_id"})
    written = pl.concat([pl.DataFrame(rows) for rows in first_written("product.events", (*EVENT, *BILLED))])
    return compare_attribution(events, written.unique("event_id", keep="first", maintain_order=True))


def compare_marts(truth: Path, told: dict[str, Any], query: Query) -> dict[str, Compared]:
    """Each mart against its truth, by `marts.NAME`.

    The days that count in the funnel are those that the lake says are complete: they must be the first ones, and over.
    """
    compared: dict[str, Compared] = {}
    for name, key in KEYS.items():
        true, stored = pl.read_parquet(truth / "marts" / f"{name}.parquet"), pl.DataFrame(query(MARTS[name]))
        if name == "revenue_daily" and told["withheld"]:
            # on which day it is booked depends on who asks Stripe when; in sum it is what is restated
            restated = true.select(
                "currency", pl.col("^restated_.*$"), pl.col("^restated_.*$").name.replace("restated", "booked")
            )
            true, stored, key = _by_currency(restated), _by_currency(stored), ["currency"]
        if name == "upgrade_exposures":
            received = datetime.fromisoformat(told["product_events"]["received_until"])
            over = (received - EXPOSURES_AWAITED).date() - timedelta(days=1)
            last = min(over, max(stored.filter("complete")["exposure_date"], default=date.min))
            true = true.with_columns(complete=pl.col("exposure_date") <= last)
            compared["marts.upgrade_funnel"] = compare(funnel(true, last), pl.DataFrame(query(FUNNEL)), ["plan", "feature"])
        compared[f"marts.{name}"] = compare(true, stored, key)
    return compared


def _by_currency(revenue: pl.DataFrame) -> pl.DataFrame:
    """The money of marts.revenue_daily by currency, without the days."""
    return revenue.group_by("currency").agg(pl.col("^(booked|restated)_.*_minor$").sum())


def _tell(name: str, compared: Compared) -> str:
    return f"{name}: {compared.wrong:,} wrong rows, e.g. {'; '.join(compared.examples)}"


def _compare_ids(true: pl.Series, stored: pl.Series) -> dict[str, int]:
    """Ids that must be there once against those that are: unique, stored, missing, duplicated, unexpected."""
    ids = stored.to_frame("id").group_by("id").len()
    wanted = true.unique().to_frame("id")
    return {
        "unique": wanted.height,
        "stored": stored.len(),
        "missing": wanted.join(ids, on="id", how="anti").height,
        "duplicated": stored.len() - ids.height,
        "unexpected": ids.join(wanted, on="id", how="anti").height,
    }


def compare_attribution(true: pl.DataFrame, stored: pl.DataFrame) -> dict[str, Any]:
    """Share of the unique true events that the lake attributes exactly as they are, and the outcomes of the true ones."""
    compared = ["customer_id", "subscription_id", "plan", "billing_status"]
    once = stored.unique("event_id", keep="none")  # an event stored twice is not right
    joined = true.join(once, on="event_id", how="left", suffix="_stored")
    resolved = pl.col("outcome") == "resolved"
    # what is beside the outcome counts only where there is something to know
    same = pl.all_horizontal([pl.col(c).eq_missing(pl.col(f"{c}_stored")) for c in compared]) | ~resolved
    right = joined.filter((pl.col("outcome") == pl.col("attribution")) & same)
    checked = true.height
    return {
        "checked": checked,
        "correct": right.height,
        "accuracy": right.height / checked if checked else 1.0,
        "outcomes": dict(sorted(true.group_by("outcome").len().iter_rows())),
    }


def compare_identity(true: pl.DataFrame, stored: pl.DataFrame) -> dict[str, Any]:
    """Events that do not say all of whose they are: how many, and how many have another workspace, user or way than the true one.

    Also wrong: one that is ambiguous and not told so, or the other way round. What billing says counts elsewhere.
    """
    told = ["attributed_workspace_id", "workspace_source", "identified_user_id"]
    asked = (pl.col("workspace_source") != "sent").fill_null(value=True) | (pl.col("outcome") == AMBIGUOUS)
    joined = true.filter(asked).join(stored.unique("event_id", keep="none"), on="event_id", how="left", suffix="_stored")
    same = pl.all_horizontal([pl.col(c).eq_missing(pl.col(f"{c}_stored")) for c in told])
    unclear = (pl.col("outcome") == AMBIGUOUS) == (pl.col("attribution") == AMBIGUOUS).fill_null(value=False)
    outcomes = joined.group_by(pl.coalesce("workspace_source", "outcome").alias("way")).len().sort("way")
    return {"events": joined.height, "wrong": joined.filter(~(same & unclear)).height, "by_way": dict(outcomes.iter_rows())}


def compare_intervals(true: pl.DataFrame, stored: pl.DataFrame) -> dict[str, int]:
    """Intervals that are true, and how many are wrong: true ones not stored exactly so, and stored ones that are not true."""
    stored = stored.select(true.columns).cast(true.schema)
    missing = true.join(stored, on=true.columns, how="anti", nulls_equal=True).height
    false = stored.join(true, on=true.columns, how="anti", nulls_equal=True).height
    doubled = stored.height - stored.unique().height
    return {"intervals": true.height, "stored": stored.height, "wrong": missing + false + doubled}


def compare_money(true: pl.DataFrame, stored: pl.DataFrame) -> dict[str, Any]:
    """Movements of money that are true, how many are wrong, and by how many minor units each (basis, currency) is off in sum."""
    found = _renamed(compare_intervals(true, stored), "movements")
    total = [pl.col("amount_minor").sum()]
    sums = {
        f"{basis} {currency}": amount
        for basis, currency, amount in true.group_by("basis", "currency").agg(total).sort("basis", "currency").iter_rows()
    }
    ours = {f"{b} {c}": amount for b, c, amount in stored.group_by("basis", "currency").agg(total).iter_rows()}
    off = {k: ours.get(k, 0) - sums.get(k, 0) for k in sorted({*sums, *ours})}
    return found | {"net_minor": sums, "off_minor": {k: v for k, v in off.items() if v}}


def _renamed(found: dict[str, int], what: str) -> dict[str, Any]:
    return {what if k == "intervals" else k: v for k, v in found.items()}


def coalesce(intervals: pl.DataFrame, key: str) -> pl.DataFrame:
    """Neighbouring intervals of a key that meet and agree in every column, as one."""
    values = [c for c in intervals.columns if c not in ("valid_from", "valid_to")]
    ordered = intervals.sort(key, "valid_from")
    continues = pl.all_horizontal([pl.col(c).eq_missing(pl.col(c).shift()) for c in values]) & (
        pl.col("valid_from") == pl.col("valid_to").shift()
    )
    return (
        ordered.with_columns((~continues.fill_null(value=False)).cum_sum().alias("__run"))
        .group_by("__run", maintain_order=True)
        .agg(*[pl.col(c).first() for c in values], pl.col("valid_from").first(), pl.col("valid_to").last())
        .drop("__run")
    )


def _problems(found: dict[str, Any]) -> list[str]:
    problems = []
    for section in ("product_events", "stripe_events"):
        problems += [
            f"{section}: {found[section][k]:,} {k}" for k in ("missing", "duplicated", "unexpected") if found[section][k]
        ]
    product = found["product_events"]
    if product["dead_letters"] < product["malformed"]:
        problems.append(
            f"product_events: {product['dead_letters']:,} dead letters for {product['malformed']:,} malformed records"
        )
    if found["attribution"]["accuracy"] < ACCURACY_WANTED:
        problems.append(f"attribution: accuracy {found['attribution']['accuracy']:.6f} is below {ACCURACY_WANTED}")
    problems += [
        f"{section}: {found[section]['wrong']:,} wrong intervals"
        for section in ("subscription_history", "plan_timeline")
        if found[section]["wrong"]
    ]
    problems += [
        f"{section}: {found[section]['wrong']:,} wrong movements"
        for section in ("revenue_ledger", "mrr_movements")
        if found[section]["wrong"]
    ]
    if wrong := found["identity"]["wrong"]:
        problems.append(f"identity: {wrong:,} events of another workspace or user than they truly are")
    if wrong := found["object_states"]["wrong"]:
        problems.append(f"object_states: {wrong:,} wrong last states")
    return problems
