"""The Airflow DAG, run for real over a small lake with the embedded broker, in a process and an AIRFLOW_HOME of its own."""

from __future__ import annotations

import ast
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from lakehouse import jobs
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.queries import query
from lakehouse.services import Services, embedded_services
from lakehouse.settings import ROOT, load_settings

DAGS = [path for path in sorted((ROOT / "dags").glob("*.py")) if path.name != "__init__.py"]
SECOND = 1_767_225_600  # 2026-01-01T00:00:00Z


def airflow_environment(folder: Path) -> dict[str, str]:
    """The environment of a process that runs Airflow: all that it writes lies in `folder`, its HOME included."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "LAKEHOUSE_"))}
    home = folder / "airflow"
    return kept | {
        "HOME": str(folder / "user"),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "LAKEHOUSE_HOME": str(folder / "lake"),
    }


def run_python(code: str, environment: dict[str, str]) -> Any:
    """Run code in a fresh interpreter; returns what it wrote, as JSON, to the file named by RESULT."""
    Path(environment["HOME"]).mkdir(exist_ok=True)
    result = Path(environment["HOME"]).parent / "result.json"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"RESULT": str(result)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return json.loads(result.read_text())


# --- the files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DAGS, ids=lambda p: p.name)
def test_a_dag_file_is_thin(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) < 40
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    packages = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert packages <= {"lakehouse", "airflow"}
    assert "select " not in text.lower()


# Python's audit events see every connection, database and file that Python code opens.
IMPORT_ALL = """
import json, os, runpy, sys
import airflow.sdk
from lakehouse import jobs
jobs.parts.writers()  # importing a library may look around; what counts is what the DAG files do
seen = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "sqlite3.connect"):
        seen.append([event, repr(args)])
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+") and "__pycache__" not in str(args[0]):
        seen.append([event, repr(args)])
sys.addaudithook(hook)
found = {}
for path in json.loads(os.environ["DAG_FILES"]):
    dags = [v for v in runpy.run_path(path).values() if isinstance(v, airflow.sdk.DAG)]
    found |= {d.dag_id: {
        "schedule": d.schedule, "catchup": d.catchup, "max_active_runs": d.max_active_runs,
        "tasks": {t.task_id: {
            "upstream": sorted(t.upstream_task_ids), "outlets": [o.uri for o in t.outlets],
            "retries": t.retries, "delay": t.retry_delay.total_seconds(),
        } for t in d.tasks},
    } for d in dags}
result = json.dumps({"seen": seen, "dags": found})
open(os.environ["RESULT"], "w").write(result)
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("import")
    environment = airflow_environment(folder) | {"DAG_FILES": json.dumps([str(p) for p in DAGS])}
    result: dict[str, Any] = run_python(IMPORT_ALL, environment)
    return result | {"folder": folder}


def test_importing_the_dags_does_no_io(imported: dict[str, Any]) -> None:
    assert imported["seen"] == []
    assert not (imported["folder"] / "lake").exists()
    assert [p.name for p in (imported["folder"] / "user").iterdir()] == []  # Airflow keeps to its own home
    assert not (imported["folder"] / "airflow" / "airflow.db").exists()


def test_the_tasks_follow_from_the_declarations(imported: dict[str, Any]) -> None:
    road = imported["dags"]["road"]
    assert (road["schedule"], road["catchup"], road["max_active_runs"]) == ("*/5 * * * *", False, 1)
    tables, sources = jobs.tables(), jobs.sources()
    kind = dict.fromkeys(sources, "ingest") | dict.fromkeys(tables, "run")
    tasks = {name: task["upstream"] for name, task in road["tasks"].items()}
    assert tasks == (
        {f"ingest.{name}": [] for name in sources}
        | {f"run.{name}": sorted(f"{kind[i]}.{i}" for i in inputs if i in kind) for name, inputs in tables.items()}
        | {f"scan.{name}": [f"run.{name}"] for name in tables}
    )
    assert {uri for task in road["tasks"].values() for uri in task["outlets"]} == {
        f"iceberg://{name.replace('.', '/')}" for name in (*sources, *tables)
    }
    assert all((task["retries"], task["delay"]) == (3, 30.0) for task in road["tasks"].values())


def test_maintenance_runs_beside_the_road(imported: dict[str, Any]) -> None:
    dags = imported["dags"]
    assert {name: dags[name]["schedule"] for name in ("expire", "compact", "tidy")} == {
        "expire": "*/5 * * * *",
        "compact": "17 * * * *",
        "tidy": "43 3 * * *",
    }
    for name in ("expire", "compact", "tidy"):
        assert (dags[name]["catchup"], dags[name]["max_active_runs"], list(dags[name]["tasks"])) == (False, 1, ["maintain"])


def test_the_audit_runs_every_night(imported: dict[str, Any]) -> None:
    dag = imported["dags"]["audit"]
    assert (dag["schedule"], dag["catchup"], dag["max_active_runs"]) == ("13 4 * * *", False, 1)
    assert list(dag["tasks"]) == ["attribution"]


# --- the run -----------------------------------------------------------------------------------------------------------


def stripe_event(number: int, kind: str, obj: dict[str, Any]) -> bytes:
    event = {"id": f"evt_{number}", "object": "event", "type": kind, "created": SECOND + number, "livemode": True}
    return json.dumps(event | {"api_version": "2024-06-20", "data": {"object": obj}}).encode()


CUSTOMER = {
    "id": "cus_1",
    "object": "customer",
    "email": "a@b.example",
    "created": SECOND,
    "currency": "usd",
    "delinquent": False,
}
PRICE = {
    "id": "price_1", "product": "prod_streamforge_pro", "currency": "usd", "unit_amount": 9900,
    "recurring": {"interval": "month", "interval_count": 1},
}  # fmt: skip
SUBSCRIPTION = {
    "id": "sub_1", "object": "subscription", "customer": "cus_1", "status": "active", "currency": "usd", "start_date": SECOND,
    "cancel_at_period_end": False, "items": {"data": [{"price": PRICE, "quantity": 3}]},
}  # fmt: skip


def fill(services: Services) -> None:
    """A customer on the Pro plan, its workspace in the CRM, and one use of a feature an hour later."""
    at = (SECOND + 3600) * 1000
    producer = Producer({"bootstrap.servers": services.bootstrap, "acks": "all"})
    headers: list[tuple[str, str | bytes | None]] = [("received_at", b"2026-01-01T00:05:00+00:00"), ("source", b"webhook")]
    for number, (kind, obj) in enumerate([("customer.created", CUSTOMER), ("customer.subscription.created", SUBSCRIPTION)], 1):
        producer.produce(
            services.stripe_topic, stripe_event(number, kind, obj), key=str(obj["id"]), headers=headers, timestamp=at
        )
    event = {"event_id": "e1", "event_name": "feature_used", "occurred_at": "2026-01-01T01:00:00Z", "workspace_id": "ws_1"}
    producer.produce(services.product_topic, json.dumps(event | {"feature": "live_captions"}), key="ws_1", timestamp=at)
    assert producer.flush(10) == 0
    path = Path(services.crm_url.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as crm:
        crm.execute("CREATE TABLE workspaces (workspace_id, mapping_id, stripe_customer_id, effective_at, updated_at, deleted)")
        crm.execute("INSERT INTO workspaces VALUES ('ws_1', 'm', 'cus_1', '2026-01-01T00:00:00Z', '2026-01-01T00:00:00Z', 0)")
        crm.execute("CREATE TABLE memberships (user_id, workspace_id, role, effective_at, updated_at, deleted)")
        crm.execute("INSERT INTO memberships VALUES ('u', 'ws_1', NULL, '2026-01-01T00:00:00Z', '2026-01-01T00:00:00Z', 0)")


# Then a second run, in which one source fails for good (its topic is not there: Terminal) and one can be tried again
# (the CRM's file is no database: Retryable).
RUN_TWICE = """
import json, os, time
from datetime import timedelta
from pathlib import Path
from airflow.utils.db import initdb
initdb()
from dags.backfill import backfill
from dags.road import road

def run(dag=road, conf=None):
    started = time.monotonic()
    done = dag.test(run_conf=conf)
    tasks = {t.task_id: [str(t.state), t.try_number] for t in done.get_task_instances()}
    return {"state": str(done.state), "tasks": tasks, "seconds": time.monotonic() - started}

results = [run()]
backfilled = run(backfill, {"start": "2026-01-01", "end": "2026-01-03", "tables": ["product.events"], "slice_days": 2})
home = Path(os.environ["LAKEHOUSE_HOME"])
found = home / "run" / "services.json"
found.write_text(json.dumps(json.loads(found.read_text()) | {"stripe_topic": "no.such.topic"}))
(home / "world" / "crm.db").write_text("this is no database, but long enough to be taken for one" * 100)
for task in road.tasks:
    task.retry_delay = timedelta(0)
results += [run(), backfilled]
Path(os.environ["RESULT"]).write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[dict[str, Any]], Lake]]:
    folder = tmp_path_factory.mktemp("run")
    environment = airflow_environment(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAKEHOUSE_HOME", environment["LAKEHOUSE_HOME"])
        settings = load_settings()
        with embedded_services(settings) as services:
            fill(services)
            results = run_python(RUN_TWICE, environment)
            yield results, open_lake(settings, Run("test", "test"))


def test_a_run_fills_every_table(runs: tuple[list[dict[str, Any]], Lake]) -> None:
    (first, *_), lake = runs
    assert {(state, tries) for state, tries in first["tasks"].values()} == {("success", 1)}
    assert first["state"] == "success"
    assert {task.partition(".")[2] for task in first["tasks"]} == {*jobs.sources(), *jobs.tables()}
    rows = query(lake, "SELECT event_id, customer_id, plan, attribution FROM product.events").to_pylist()
    assert rows == [{"event_id": "e1", "customer_id": "cus_1", "plan": "pro", "attribution": "resolved"}]


def test_what_a_person_must_mend_fails_at_once_and_the_rest_is_tried_again(runs: tuple[list[dict[str, Any]], Lake]) -> None:
    (_, second, _), _ = runs
    tasks = second["tasks"]
    assert tasks["ingest.raw.stripe_events"] == ["failed", 1]  # Terminal
    assert tasks["ingest.raw.crm_memberships"] == ["failed", 4]
    assert tasks["ingest.raw.crm_workspaces"] == ["failed", 4]  # Retryable: once, and three times again
    assert tasks["ingest.raw.product_events"] == ["success", 1]
    # what is made of the one source that came goes on, all else waits
    made, failed = jobs.tables(), {"raw.stripe_events", "raw.crm_memberships", "raw.crm_workspaces"}
    for name, inputs in made.items():
        failed |= {name} if failed & set(inputs) else set()
    others = {name: state for name, (state, _) in tasks.items() if not name.startswith("ingest.")}
    assert others == {n: "upstream_failed" if n.partition(".")[2] in failed else "success" for n in others}
    assert {"upstream_failed", "success"} == set(others.values())
    assert second["state"] == "failed"


def test_a_window_is_made_again_by_hand(runs: tuple[list[dict[str, Any]], Lake]) -> None:
    (*_, backfilled), _ = runs
    assert (backfilled["state"], backfilled["tasks"]) == ("success", {"make_again": ["success", 1]})
