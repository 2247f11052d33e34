"""Is what the tables say right? Every night a random sample is derived again by other code and compared."""

from datetime import UTC, datetime, timedelta

from airflow.sdk import DAG, task
from airflow.sdk.exceptions import AirflowFailException

from lakehouse import jobs
from lakehouse.errors import Terminal

with DAG("audit", schedule="13 4 * * *", start_date=datetime(2026, 1, 1, tzinfo=UTC), catchup=False, max_active_runs=1) as audit:

    @task(retries=3, retry_delay=timedelta(seconds=30))
    def attribution() -> dict[str, object]:
        """The share of product events whose workspace, customer and plan a second derivation finds too: at least 99.9 %."""
        try:
            return jobs.audit("attribution")
        except Terminal as error:
            raise AirflowFailException(str(error)) from error

    attribution()
