"""The road from the sources to the marts, every 5 minutes: ingest each source, run each table after its inputs, scan it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import DAG, Asset, task
from airflow.sdk.exceptions import AirflowFailException

from lakehouse import jobs
from lakehouse.errors import Terminal


def step(job: Callable[[str], Any]) -> Any:
    """A task of a job: what running it again cannot change fails at once, anything else is retried."""

    def attempt(table: str) -> Any:
        try:
            return job(table)
        except Terminal as error:
            raise AirflowFailException(str(error)) from error

    return task(retries=3, retry_delay=timedelta(seconds=30))(attempt)


ingest, run, scan = map(step, (jobs.ingest_source, jobs.run_table, jobs.scan_table))

with DAG("road", schedule="*/5 * * * *", start_date=datetime(2026, 1, 1, tzinfo=UTC), catchup=False, max_active_runs=1) as road:
    done, tables = {}, jobs.tables()
    for name in (*jobs.sources(), *tables):
        kind, job = ("run", run) if name in tables else ("ingest", ingest)
        asset = Asset(f"iceberg://{name.replace('.', '/')}")
        done[name] = job.override(task_id=f"{kind}.{name}", outlets=[asset])(name)
        for upstream in (done[i] for i in tables.get(name, ()) if i in done):
            upstream >> done[name]
        if name in tables:
            done[name] >> scan.override(task_id=f"scan.{name}")(name)
