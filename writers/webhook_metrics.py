"""What the receiver counts, in Prometheus' terms; all series exist from the start, so that `rate` sees the first increase."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

OUTCOMES = {
    "accepted": 200, "bad_signature": 400, "not_json_object": 400, "disconnected": 400, "wrong_method": 405, "read_timeout": 408,
    "too_large": 413, "broker_unavailable": 503, "failed": 500,
}  # fmt: skip
"""What became of a request for the webhook path, and the status it was answered with."""

REASONS = ("missing", "malformed", "no_v1", "mismatch", "stale", "future")
"""Why a signature was refused."""

REFUSALS = {"malformed": 400, "head_too_slow": 408, "head_too_large": 431, "over_capacity": 503}
"""Why a connection was refused before there was a request to judge."""

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """The receiver's series, in a registry of their own: two receivers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("stripe_webhook_requests", "Requests by outcome.", ("outcome",), registry=registry)
        self._signatures = Counter("stripe_webhook_bad_signatures", "Refused signatures.", ("reason",), registry=registry)
        self._refusals = Counter("stripe_webhook_refused_connections", "Refused connections.", ("reason",), registry=registry)
        self.accepted_bytes = Counter("stripe_webhook_accepted_bytes", "Bytes of accepted bodies.", registry=registry)
        self.produce_seconds = Histogram(
            "stripe_webhook_produce_seconds", "From a verified body to the broker's report.", buckets=_SECONDS, registry=registry
        )
        self.last_accepted = Gauge("stripe_webhook_last_accepted_timestamp_seconds", "Of the last 200.", registry=registry)
        self.connections = Gauge("stripe_webhook_connections", "Open connections.", registry=registry)
        # `labels` takes a lock and a dict: looked up once
        self.requests = {outcome: self._requests.labels(outcome) for outcome in OUTCOMES}
        self.bad_signatures = {reason: self._signatures.labels(reason) for reason in REASONS}
        self.refusals = {reason: self._refusals.labels(reason) for reason in REFUSALS}

    def text(self) -> bytes:
        """The exposition (https://prometheus.io/docs/instrumenting/exposition_formats/)."""
        return generate_latest(self.registry)
