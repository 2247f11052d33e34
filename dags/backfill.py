"""Make a window again, started by hand with its days: after a fix of a transform, a column newly declared, or a doubt."""

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import DAG, Param, task
from airflow.sdk.exceptions import AirflowFailException

from lakehouse import jobs
from lakehouse.errors import Terminal


@task(retries=3, retry_delay=timedelta(minutes=1))
def make_again(params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A run that was stopped, or is tried again, goes on where it stood; windows that do not overlap can be run side by side."""
    asked = params or {}
    try:
        return jobs.backfill(asked["start"], asked["end"], asked["tables"], asked["slice_days"])
    except Terminal as error:
        raise AirflowFailException(str(error)) from error


with DAG(
    "backfill",
    schedule=None,
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    params={
        "start": Param("2026-01-01", type="string", format="date", description="first day (UTC)"),
        "end": Param("2026-01-02", type="string", format="date", description="the day after the last one"),
        "tables": Param([], type="array", description="only these tables"),
        "slice_days": Param(1, type="integer", minimum=1, description="days made at a time"),
    },
) as backfill:
    make_again()
