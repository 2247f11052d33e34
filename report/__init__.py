"""What `lakehouse report` shows: report.yaml, and a query file a block."""
