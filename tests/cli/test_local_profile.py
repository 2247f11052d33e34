"""`LAKEHOUSE_PROFILE=local lakehouse up`: Apache Kafka and SeaweedFS, found by other commands, their data kept over a restart."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from command import Ran, finish, start, wait_for
from test_services import BODY, signature

from lakehouse.local.kafka import why_unavailable

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())
LOCAL = {"LAKEHOUSE_PROFILE": "local"}


def test_a_webhook_from_post_to_row_on_kafka_and_s3(call: Callable[..., Ran], tmp_path: Path) -> None:
    home = tmp_path / "home"
    call("ingest", **LOCAL).failed(2, "LAKEHOUSE_CATALOG_URI", "start its services in another shell: lakehouse up")
    for round_ in range(2):
        process = start(home, "up", "--show-secret", **LOCAL)
        try:
            wait_for((home / "run" / "local.json").exists, process, 120)
            assert (home / "run" / "local.json").stat().st_mode & 0o077 == 0
            assert process.stdout is not None
            lines = {}
            while "Ctrl-C" not in (line := process.stdout.readline()):
                lines[line.split()[0]] = line.split()[1]
            if round_ == 0:
                call("up", **LOCAL).failed(2, "already run")
                assert httpx.post(lines["webhooks"], content=BODY, headers=signature(lines["secret"], BODY)).is_success
                rows = {b["table"]: b["rows"] for b in call("ingest", "--json", **LOCAL).fine().json if b["rows"]}
                assert rows == {"raw.stripe_events": 1}
            found = call("sql", "SELECT event_id, source FROM raw.stripe_events", "--json", **LOCAL).fine().json
            assert found == [{"event_id": "evt_first", "source": "webhook"}]
            shown = call("settings", **LOCAL).fine().out
            assert lines["S3"] in shown
            process.send_signal(signal.SIGTERM)
            assert finish(process, 60).fine().err == ""
        finally:
            process.kill()
            process.wait()
        assert not (home / "run" / "local.json").exists()
        assert not (home / "warehouse").exists()
