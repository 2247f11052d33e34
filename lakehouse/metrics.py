"""What the machine counts about itself, in Prometheus' terms: one place, so that a name means the same in every process.

A long-running command serves them (`LAKEHOUSE_METRICS_PORT`); any other can write them to a file when it ends
(`LAKEHOUSE_METRICS_FILE`), for the textfile collector of the node exporter. `announce` makes every series of a table exist
from the start: an absent series and a zero must not look alike to an alert.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, start_http_server, write_to_textfile

from lakehouse.settings import Settings

TABLE = ("table",)
AUDIT = ("audit",)
STAGES = ("read", "convert", "encode", "commit")
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

ROWS = Counter("lakehouse_rows", "Rows committed.", TABLE)
BYTES = Counter("lakehouse_bytes", "Payload bytes committed.", TABLE)
COMMITS = Counter("lakehouse_commits", "Commits that landed.", TABLE)
CONFLICTS = Counter("lakehouse_commit_conflicts", "Attempts of a commit that another commit came before.", TABLE)
FENCED = Counter("lakehouse_fenced", "Batches dropped because another writer had gone on from their positions.", TABLE)
UNKNOWN_OUTCOMES = Counter("lakehouse_commit_unknown_outcomes", "Attempts of a commit whose answer was lost.", TABLE)
RESTARTS = Counter("lakehouse_writer_restarts", "Times a writer dropped its batch after a failure and went on.", TABLE)
DEAD_LETTERS = Counter("lakehouse_dead_letters", "Records kept as dead letters, by the table they were left out of.", TABLE)
IGNORED = Gauge("lakehouse_ignored_records", "Records of a kind that is not kept, since the table began.", TABLE)
ORPHAN_BYTES = Gauge("lakehouse_orphan_bytes", "Bytes of files that no snapshot names, as of the last maintenance.", TABLE)
AUDIT_AGREEMENT = Gauge("lakehouse_audit_agreement", "Share of the rows sampled that agree with a second derivation.", AUDIT)
AUDIT_CHECKED = Gauge("lakehouse_audit_rows_checked", "Rows that the last audit derived again.", AUDIT)
AUDIT_OUTCOMES = Gauge("lakehouse_audit_outcome_share", "Share of all rows of the window by outcome.", ("audit", "outcome"))
LAG_RECORDS = Gauge("lakehouse_lag_records", "Records in Kafka that are not committed yet.", ("table", "partition"))
LAG_SECONDS = Gauge("lakehouse_lag_seconds", "Age of the oldest record read and not committed yet.", ("table", "partition"))
SINCE_COMMIT = Gauge("lakehouse_seconds_since_last_commit", "Since this process last saw the table change.", TABLE)
BATCH_SECONDS = Histogram(
    "lakehouse_batch_seconds",
    "Duration of a batch by stage: read, convert, encode, commit.",
    ("table", "stage"),
    buckets=_SECONDS,
)

_last_commit: dict[str, float] = {}


def announce(table: str, committed_at: float | None = None) -> None:
    """Make all series of a table exist. committed_at: epoch seconds of its last commit; None if there was none."""
    for metric in (ROWS, BYTES, COMMITS, CONFLICTS, FENCED, UNKNOWN_OUTCOMES, RESTARTS, DEAD_LETTERS, ORPHAN_BYTES):
        metric.labels(table)
    for stage in STAGES:
        BATCH_SECONDS.labels(table, stage)
    if committed_at is not None:
        _last_commit.setdefault(table, committed_at)
    SINCE_COMMIT.labels(table).set_function(lambda: time.time() - _last_commit.get(table, math.nan))


def committed(table: str, rows: int, payload_bytes: int) -> None:
    """Count a batch that landed; how often others were in its way is counted where it happens (lakehouse/publish.py)."""
    _last_commit[table] = time.time()
    ROWS.labels(table).inc(rows)
    BYTES.labels(table).inc(payload_bytes)
    COMMITS.labels(table).inc()


def audited(audit: str, agreement: float, checked: int, outcomes: Mapping[str, float]) -> None:
    """Tell what an audit found. outcomes: the share of each, also of those that no row has."""
    AUDIT_AGREEMENT.labels(audit).set(agreement)
    AUDIT_CHECKED.labels(audit).set(checked)
    for outcome, share in outcomes.items():
        AUDIT_OUTCOMES.labels(audit, outcome).set(share)


def serve(settings: Settings) -> int:
    """Serve the metrics if the settings say where; returns the port, 0 if they do not."""
    if settings.metrics_port is None:
        return 0
    server, _ = start_http_server(settings.metrics_port, settings.metrics_host)
    return int(server.server_port)


def dump_if_asked(settings: Settings) -> None:
    """Write the metrics to the file that the settings name, if they name one."""
    if settings.metrics_file:
        dump(settings.metrics_file)


def dump(path: Path) -> None:
    """Write the metrics to a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_to_textfile(os.fspath(path), REGISTRY)
