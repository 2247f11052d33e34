"""WHEN: Airflow DAGs, each thin; the work is in `lakehouse`."""
