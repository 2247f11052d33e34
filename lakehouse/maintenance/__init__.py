"""Table health: retention, compaction, manifests, expiry, orphans. Safe beside writers: docs/runbook-maintenance.md."""
