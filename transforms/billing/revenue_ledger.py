"""billing.revenue_ledger: what was billed and what cash moved, in entries that are never changed.

What should stand in the books is a function of the facts known (transforms/postings.sql). Facts come at each distinct
`recorded_at` of an origin (a charge or an invoice with all that hangs on it); `lakehouse.ledger.fold` writes down what each
step of knowledge changes. So the entries recorded up to T are the same function of the events first received by T, and
neither the order of the rows nor the split into batches can matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyiceberg.manifest import DataFile

from lakehouse.commit import scope_of
from lakehouse.coordinates import below_sql, ranges_sql
from lakehouse.deletes import take_out
from lakehouse.keyed import holding_sql
from lakehouse.ledger import STEP, fold
from lakehouse.links import family
from lakehouse.plans import Plan, Staged, count_rows, frame, live_files, stage_with
from lakehouse.predicates import at_least
from lakehouse.queries import POSITION, bind_arrow, bind_sql, epoch_time, fetch, files_sql
from lakehouse.transforms import Inputs

INPUTS = ("billing.event_versions",)

POSTINGS = Path(__file__).parent.parent / "postings.sql"
KEY = ("basis", "entry_type", "object_type", "object_id", "part")
FIELDS = ("origin_id", "customer_id", "currency", "amount_minor", "tax_minor", "booked_at", "effective_at")

# What postings.sql needs of the normalised state (catalog/reference/stripe_objects.yaml); an object lacks what its type has not.
TEXTS = ("customer_id", "currency", "status", "reason", "charge_id", "invoice_id", "source_id", "reporting_category")
NUMBERS = (
    "amount_minor", "amount_captured_minor", "amount_refunded_minor", "amount_remaining_minor", "total_minor",
    "total_excluding_tax_minor", "tax_minor", "fee_minor",
)  # fmt: skip
TIMES = ("created", "finalized_at", "paid_at", "voided_at", "marked_uncollectible_at")

# An object's parent is what its revenue belongs to: charge or invoice; of a balance transaction first its source.
PARENT = """CASE object_type
    WHEN 'charge' THEN object_id WHEN 'invoice' THEN object_id
    WHEN 'refund' THEN state ->> '$.charge_id' WHEN 'dispute' THEN state ->> '$.charge_id'
    WHEN 'credit_note' THEN state ->> '$.invoice_id' WHEN 'balance_transaction' THEN state ->> '$.source_id'
END"""
MONEY = "livemode AND object_type IN ('charge', 'refund', 'dispute', 'balance_transaction', 'invoice', 'credit_note')"

DEPTH = 2
"""Links from an object to its origin: of a balance transaction to its refund or dispute, from there to the charge."""

READ = (
    "account", "livemode", "event_id", "event_type", "object_type", "object_id", "created_at", "state", "recorded_at", "topic",
    "partition", "offset",
)  # fmt: skip

ORIGINS = f"""
CREATE OR REPLACE TEMP TABLE parents AS
SELECT account, object_type, object_id, coalesce(max({PARENT}), object_id) AS parent_id
FROM billing.event_versions WHERE {MONEY}
GROUP BY account, object_type, object_id;

CREATE OR REPLACE TEMP TABLE origins AS
SELECT p.account, p.object_type, p.object_id, coalesce(g.parent_id, p.parent_id) AS grp
FROM (SELECT *, CASE WHEN object_type = 'balance_transaction' THEN parent_id END AS source_id FROM parents) AS p
LEFT JOIN (FROM parents WHERE object_type IN ('refund', 'dispute')) AS g ON g.account = p.account AND g.object_id = p.source_id
"""


def _facts_sql() -> str:
    columns = [f"state ->> '$.{c}' AS {c}" for c in TEXTS]
    columns += [f"TRY_CAST(state ->> '$.{c}' AS BIGINT) AS {c}" for c in NUMBERS]
    columns += [epoch_time(f"state ->> '$.{c}'") + f" AS {'made_at' if c == 'created' else c}" for c in TIMES]
    return f"""
    CREATE OR REPLACE TEMP TABLE facts AS
    SELECT
        account, l.grp, object_type, object_id, v.event_id, v.event_type, v.created_at, v.recorded_at, v.topic, v.partition,
        v."offset", TRY_CAST(state ->> '$.captured' AS BOOLEAN) AS captured, {", ".join(columns)},
        dense_rank() OVER (PARTITION BY account, l.grp ORDER BY v.recorded_at) AS {STEP}
    FROM billing.event_versions AS v
    JOIN origins AS l USING (account, object_type, object_id)
    WHERE {MONEY}
    """


# Of the events that came at one step, the entry names one about its own object, if there is one.
CAUSES = """
SELECT
    e.*, s.recorded_at, s.event_id, s.topic, s.partition, s."offset"
FROM entries AS e
JOIN facts AS s ON s.account = e.account AND s.grp = e.grp AND s.step = e.step
QUALIFY row_number() OVER (
    PARTITION BY e.account, e.grp, e.step, e.reverses_step, e.basis, e.entry_type, e.object_id, e.part
    ORDER BY s.object_id <> e.object_id, s.object_id <> e.origin_id, s.event_id
) = 1
"""

# A day is closed `close_after_hours` after its end; what is learnt later is posted to the first day still open then.
ENTRIES = """
WITH named AS (
    SELECT
        *, reverses_step IS NOT NULL AS is_reversal,
        concat_ws('/', entry_type, object_id, nullif(part, ''), event_id, CASE WHEN reverses_step IS NOT NULL THEN 'reversal' END)
            AS entry_id
    FROM causes
)
SELECT
    n.account, n.entry_id, n.basis, n.entry_type, n.origin_id, n.object_type, n.object_id, n.customer_id, n.currency,
    CASE WHEN n.is_reversal THEN -n.amount_minor ELSE n.amount_minor END AS amount_minor,
    CASE WHEN n.is_reversal THEN -n.tax_minor ELSE n.tax_minor END AS tax_minor,
    n.effective_at, n.booked_at, n.recorded_at,
    greatest(
        CAST(timezone($time_zone, n.booked_at) AS DATE),
        CAST(timezone($time_zone, n.recorded_at - to_hours($close_after_hours)) AS DATE)
    ) AS posting_date,
    o.entry_id AS reverses, n.event_id, n.topic, n.partition, n."offset"
FROM named AS n
LEFT JOIN named AS o
    ON o.account = n.account AND o.grp = n.grp AND o.step = n.reverses_step AND NOT o.is_reversal AND o.basis = n.basis
    AND o.entry_type = n.entry_type AND o.object_id = n.object_id AND o.part = n.part
"""


# A batch touches the origins that its rows belong to. Of those, only what follows from its first receipt on can change.
TOUCHED = """
CREATE OR REPLACE TEMP TABLE touched AS
SELECT l.account, l.grp, min(n.recorded_at) AS since
FROM origins AS l JOIN new_versions AS n USING (account, object_type, object_id)
GROUP BY l.account, l.grp
"""

COLUMNS = (
    "account", "entry_id", "basis", "entry_type", "origin_id", "object_type", "object_id", "customer_id", "currency",
    "amount_minor", "tax_minor", "effective_at", "booked_at", "recorded_at", "posting_date", "reverses", "event_id", "topic",
    "partition", "offset",
)  # fmt: skip


def build(inputs: Inputs) -> pa.Table:
    """All entries of the origins that `billing.event_versions` tells of, whole: every version of each of their objects."""
    inputs.connection.execute(ORIGINS)
    return _entries(inputs)


def plan(plan: Plan) -> Staged:
    """Append the entries that a batch adds.

    A batch can bring a receipt older than one that is already posted (partitions do not advance together). Entries recorded
    later are then taken out and written anew; they lie beyond what any reading was allowed to ask for
    (lakehouse.ledger.known_until), so no report that was given out changes.
    """
    connection, driver = plan.connection, plan.declared.build.driver
    assert driver
    new = plan.new_rows_sql(driver)
    count = count_rows(connection, new)
    connection.execute(
        f"CREATE TEMP TABLE new_versions AS SELECT account, object_type, object_id, recorded_at FROM {new} WHERE {MONEY}"
    )
    since = connection.execute("SELECT min(recorded_at) FROM new_versions").fetchall()[0][0]
    if since is None:
        return Staged((), new_input_rows=count)
    _bind_versions(plan, driver)
    connection.execute(ORIGINS)
    connection.execute(TOUCHED)
    connection.execute("DELETE FROM origins WHERE (account, grp) NOT IN (SELECT (account, grp) FROM touched)")
    connection.register("__built", _entries(plan.inputs()))
    # an entry belongs to the origin of its object: of one that has a row, or that a balance transaction names as its source
    of_origin = """(
        SELECT account, object_id, min(since) AS since
        FROM (SELECT account, grp, unnest([object_id, source_id]) AS object_id FROM facts) JOIN touched USING (account, grp)
        GROUP BY account, object_id
    )"""
    columns = ", ".join(f'e."{c}"' for c in COLUMNS)
    late = f"SELECT {columns}{{}} FROM {{}} AS e JOIN {of_origin} AS o USING (account, object_id) WHERE e.recorded_at >= o.since"
    connection.execute(f"CREATE TEMP TABLE wanted AS {late.format('', '__built')}")
    held = live_files(plan, at_least("recorded_at", since.isoformat()))
    if not held:
        return _staged(plan, count, fetch(connection, "FROM wanted"))
    there = files_sql(plan.table, held, numbered=True)
    connection.execute(f"CREATE TEMP TABLE posted AS {late.format(f', filename, {POSITION}', there)}")
    same = " AND ".join(f'w."{c}" IS NOT DISTINCT FROM p."{c}"' for c in COLUMNS)
    missing = f"SELECT {columns} FROM wanted AS e WHERE NOT EXISTS (SELECT 1 FROM posted AS p WHERE {same.replace('w.', 'e.')})"
    outdated = f"FROM posted AS p WHERE NOT EXISTS (SELECT 1 FROM wanted AS w WHERE {same})"
    deletes, remove, kept = take_out(plan, frame(connection, outdated))
    return _staged(plan, count, fetch(connection, missing), kept, deletes, remove)


def _bind_versions(plan: Plan, driver: str) -> None:
    """Bind the driver, up to the positions to reach: all versions of whatever may share an origin with the new ones.

    Of the first batch that is all there is. Later ones are found by their links; what is found besides its origins is left out.
    """
    connection, (table, snapshot) = plan.connection, plan.pinned[driver]
    objects = frame(connection, "SELECT DISTINCT account, object_id FROM new_versions")
    members = family(plan, objects, DEPTH)
    if members is None:
        bind_sql(connection, driver, ranges_sql(table, snapshot, {k: (0, end) for k, end in plan.reached.items()}))
        return
    asked = members.to_arrow()
    connection.register("__family", asked)
    held = holding_sql(table, snapshot, "object_id", asked.column("object_id"))
    columns = ", ".join(f'"{c}"' for c in READ)
    rows = (
        f"SELECT {columns} FROM {held} SEMI JOIN __family USING (account, object_id) WHERE {MONEY} AND {below_sql(plan.reached)}"
    )
    # in memory: several statements look at them, and each would find them again in the files
    bind_arrow(connection, driver, fetch(connection, rows))


def _staged(
    plan: Plan,
    count: int,
    rows: pa.Table,
    kept: pa.Table | None = None,
    deletes: Sequence[DataFile] = (),
    remove: Sequence[DataFile] = (),
) -> Staged:
    files = [*stage_with(plan, rows, kept), *deletes]
    written = rows.num_rows + (kept.num_rows if kept is not None else 0)
    return Staged(files, remove, scope_of([*files, *remove]), new_input_rows=count, rows=written)


def _entries(inputs: Inputs) -> pa.Table:
    """The entries of the origins in the temporary table `origins`, from all versions of their objects."""
    connection = inputs.connection
    connection.execute(_facts_sql())
    connection.execute("""
        CREATE OR REPLACE TEMP VIEW known AS
        SELECT s.step, f.* EXCLUDE (step)
        FROM (SELECT DISTINCT account, grp, step FROM facts) AS s
        JOIN facts AS f ON f.account = s.account AND f.grp = s.grp AND f.step <= s.step
    """)
    postings = frame(connection, POSTINGS.read_text("utf-8"))
    steps = frame(connection, f"SELECT DISTINCT account, grp, {STEP} FROM facts")
    entries = fold(postings, steps, group=["account", "grp"], key=KEY, fields=FIELDS)
    connection.register("entries", entries.to_arrow())
    connection.register("causes", fetch(connection, CAUSES))
    rule = inputs.reference("ledger")[0]
    parameters = {"time_zone": rule["time_zone"], "close_after_hours": rule["close_after_hours"]}
    return fetch(connection, ENTRIES, parameters)
