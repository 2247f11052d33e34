"""Compare the lake with Stripe: missed events hourly, all objects weekly. It fails when a difference outlives its repair."""

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import DAG, task
from airflow.sdk.exceptions import AirflowFailException

from lakehouse import jobs
from lakehouse.errors import Terminal


@task(retries=3, retry_delay=timedelta(minutes=5))
def compare(events: bool, objects: list[str]) -> Any:
    """What running it again cannot change fails at once; anything else (Stripe or Kafka is away) goes on where it stood."""
    try:
        return jobs.reconcile(events, objects)
    except Terminal as error:
        raise AirflowFailException(str(error)) from error


# apart, so that a sweep of hours does not hold up the events: they share no position
for name, schedule, objects in (("reconcile_events", "17 * * * *", []), ("reconcile_objects", "37 3 * * 0", ["all"])):
    with DAG(name, schedule=schedule, start_date=datetime(2026, 1, 1, tzinfo=UTC), catchup=False, max_active_runs=1) as dag:
        compare.override(task_id="compare")(not objects, objects)
    globals()[name] = dag
