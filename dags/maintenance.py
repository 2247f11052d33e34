"""Table health: snapshots expire every 5 minutes, small files are compacted hourly, orphans and old partitions go at night."""

from datetime import UTC, datetime, timedelta

from airflow.sdk import DAG, task
from airflow.sdk.exceptions import AirflowFailException

from lakehouse import jobs
from lakehouse.errors import Terminal


def schedule(name: str, cron: str, *steps: str) -> DAG:
    """One task: the steps over every table that exists. A later run is skipped while one is still at work."""

    @task(retries=3, retry_delay=timedelta(seconds=30))
    def maintain() -> list[dict[str, object]]:
        try:
            return jobs.maintain_tables(steps)
        except Terminal as error:
            raise AirflowFailException(str(error)) from error

    with DAG(name, schedule=cron, start_date=datetime(2026, 1, 1, tzinfo=UTC), catchup=False, max_active_runs=1) as dag:
        maintain()
    return dag


expire = schedule("expire", "*/5 * * * *", "expire")
compact = schedule("compact", "17 * * * *", "compact", "manifests")
tidy = schedule("tidy", "43 3 * * *", "retention", "orphans")
