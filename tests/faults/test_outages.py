"""What the clients of catalog and object store do by themselves when it fails, and what the commit path makes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import ValidationError
from pyiceberg.exceptions import CommitStateUnknownException, RESTError, ServiceUnavailableError
from records import RAW, HttpWire, Wire, append, append_change, offsets, position, stored
from requests import RequestException

from lakehouse.catalogs import open_catalog
from lakehouse.commit import commit
from lakehouse.errors import CommitUnresolved, Retryable, Terminal
from lakehouse.lake import Lake, history
from lakehouse.local import Kind
from lakehouse.queries import query
from tests.proxy import Answer, FaultProxy, Request

XML = (("Content-Type", "application/xml"),)
SLOW_DOWN = Answer(503, b"<Error><Code>SlowDown</Code><Message>wait</Message></Error>", XML)
DENIED = Answer(403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>", XML)


@pytest.fixture(params=["rest", "glue"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """The catalogs that have a network."""
    found: Kind = request.param
    return found


@pytest.fixture
def http(wire: Wire) -> HttpWire:
    assert isinstance(wire, HttpWire)
    return wire


def error_answer(kind: Kind, status: int) -> Answer:
    """A failure as the service itself would put it."""
    if kind == "rest":
        return Answer(status, b'{"error": {"message": "said so", "type": "SomeException", "code": %d}}' % status)
    names = {400: "ThrottlingException", 403: "AccessDeniedException", 500: "InternalServiceException"}
    name = names.get(status, "ServiceUnavailable")
    body = b'{"__type": "%s", "message": "said so"}' % name.encode()
    return Answer(status, body, (("Content-Type", "application/x-amz-json-1.1"), ("x-amzn-errortype", name)))


@pytest.mark.parametrize("status", [500, 502, 503, 504])
@pytest.mark.parametrize("landed", [True, False])
def test_an_error_of_the_server_is_an_unknown_outcome(lake: Lake, kind: Kind, http: HttpWire, status: int, landed: bool) -> None:
    def fail(send: Callable[[], Any]) -> Answer:
        if landed:
            send()
        return error_answer(kind, status)

    table = lake.open_for_write(RAW)
    http.faults = [fail]
    done = commit(table, lake.run, append_change(lake, table, 0, 0, 5))
    assert (done.conflicts, done.unknown_outcomes) == (0, 1)
    assert http.sent == (1 if landed else 2)  # botocore and urllib3 sent nothing by themselves
    assert [s.snapshot_id for s in history(lake.load(RAW))] == [done.snapshot_id]
    assert offsets(lake) == list(range(5))


def test_an_answer_cut_short_is_an_unknown_outcome(lake: Lake, http: HttpWire) -> None:
    def cut(send: Callable[[], Any]) -> Answer:
        answer = send()
        return Answer(answer.status, b'{"met', answer.headers)

    table = lake.open_for_write(RAW)
    http.faults = [cut]
    commit(table, lake.run, append_change(lake, table, 0, 0, 5))
    assert (http.sent, offsets(lake)) == (1, list(range(5)))


@pytest.mark.parametrize("landed", [True, False])
def test_a_silent_catalog_is_not_waited_for_for_ever(lake: Lake, kind: Kind, http: HttpWire, landed: bool) -> None:
    """pyiceberg itself gives a REST request no time limit: an answer lost on the way would hold the writer up for ever."""
    lake.settings.__dict__["catalog_timeout_seconds"] = 1.0
    given_up = threading.Event()

    def no_answer(send: Callable[[], Any]) -> Any:
        if landed:
            send()
        assert given_up.wait(60), "the client still waits"
        raise ConnectionError

    table = lake.open_for_write(RAW)
    http.faults = [no_answer]
    done = commit(table, lake.run, append_change(lake, table, 0, 0, 5))
    given_up.set()
    assert (done.unknown_outcomes, offsets(lake)) == (1, list(range(5)))


@pytest.mark.parametrize("kind", ["rest"], indirect=True)
def test_an_expired_token_is_renewed(lake: Lake, http: HttpWire) -> None:
    append(lake, 0, 0, 5)
    lake.catalog._session.auth.auth_manager._token = "expired"  # type: ignore[attr-defined]
    table = lake.open_for_write(RAW)
    lake.catalog._session.auth.auth_manager._token = "expired"  # type: ignore[attr-defined]
    done = commit(table, lake.run, append_change(lake, table, 0, 5, 9))
    assert (done.unknown_outcomes, offsets(lake)) == (0, list(range(9)))


@pytest.mark.parametrize("landed", [True, False])
def test_a_refusal_stops_at_once_unless_it_was_a_yes(lake: Lake, kind: Kind, http: HttpWire, landed: bool) -> None:
    """Rights that were taken away will not come back in a minute: no 60 attempts, but a look first."""

    def refuse(send: Callable[[], Any]) -> Answer:
        if landed:
            send()
        return error_answer(kind, 403)

    table = lake.open_for_write(RAW)
    change = append_change(lake, table, 0, 0, 5)
    http.faults = [refuse]
    if landed:
        commit(table, lake.run, change)
    else:
        with pytest.raises(Terminal, match=r"raw\.records: the commit was refused: .*said so"):
            commit(table, lake.run, change)
        commit(table, lake.run, change)  # rights given back, the job run again
    assert offsets(lake) == list(range(5))


@pytest.mark.parametrize("kind", ["rest"], indirect=True)
@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_request_that_the_catalog_calls_wrong_is_given_up_when_it_says_so_again(
    lake: Lake, other: Lake, kind: Kind, http: HttpWire, status: int
) -> None:
    """Once may be a state that another commit has changed meanwhile; twice on one state, it will be said for ever."""

    def overtaken(_send: Callable[[], Any]) -> Answer:
        append(other, 1, http.sent, http.sent + 1)
        return error_answer(kind, status)

    def wrong(_send: Callable[[], Any]) -> Answer:
        return error_answer(kind, status)

    def landed(send: Callable[[], Any]) -> Answer:
        send()
        return error_answer(kind, status)

    append(lake, 0, 0, 5)
    append(other, 1, 0, 1)
    table = lake.open_for_write(RAW)
    change = append_change(lake, table, 0, 5, 9)
    http.sent, http.faults = 0, [overtaken, overtaken, overtaken, wrong, wrong, wrong]
    with pytest.raises(Terminal, match=r"raw\.records: the commit was refused: .*said so\. Asked again, the answer was the same"):
        commit(table, lake.run, change)
    assert http.sent == 5
    http.faults = [wrong, landed]
    commit(table, lake.run, change)
    assert (offsets(lake), offsets(lake, 1)) == (list(range(9)), [0, 1, 2, 3])


def test_a_defect_is_not_tried_for_minutes(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def defect(*arguments: Any) -> Any:
        asked.append(arguments)
        raise TypeError("made up")

    table = lake.open_for_write(RAW)
    change = append_change(lake, table, 0, 0, 5)
    with monkeypatch.context() as patch:
        patch.setattr(lake.catalog, "commit_table", defect)
        with pytest.raises(TypeError, match="made up"):
            commit(table, lake.run, change)
    assert len(asked) == 2
    commit(table, lake.run, change)
    assert offsets(lake) == list(range(5))


def test_a_throttled_commit_is_sent_again(lake: Lake, kind: Kind, http: HttpWire) -> None:
    table = lake.open_for_write(RAW)
    http.faults = [lambda _: error_answer(kind, 429 if kind == "rest" else 400)] * 3
    commit(table, lake.run, append_change(lake, table, 0, 0, 5))
    assert (http.sent, offsets(lake)) == (4, list(range(5)))


def test_what_each_client_raises(lake: Lake, kind: Kind, http: HttpWire) -> None:
    """The commit path rests on one thing: nothing but a conflict raises CommitFailedException. The rest is here to be read."""
    append(lake, 0, 0, 5)
    table = lake.load(RAW)

    def lost(_send: Callable[[], Any]) -> Any:
        raise ConnectionError

    expected = (
        {500: CommitStateUnknownException, 502: CommitStateUnknownException, 503: ServiceUnavailableError, 429: RESTError}
        if kind == "rest"
        else {500: ClientError, 502: ClientError, 503: ClientError, 400: ClientError}
    )
    for status, kind_of_error in expected.items():
        http.faults = [lambda _, status=status: error_answer(kind, status)]
        with pytest.raises(kind_of_error):
            table.transaction().set_properties({"a": str(status)}).commit_transaction()
    http.faults = [lost]
    with pytest.raises(RequestException if kind == "rest" else BotoCoreError):
        table.transaction().set_properties({"a": "b"}).commit_transaction()
    if kind == "rest":  # Glue's answer to an update says nothing that could be cut
        http.faults = [lambda send: Answer(200, b'{"met', send().headers)]
        with pytest.raises(ValidationError):
            table.transaction().set_properties({"a": "c"}).commit_transaction()


def test_reading_is_tried_again_by_the_client(
    lake: Lake, kind: Kind, http: HttpWire, monkeypatch: pytest.MonkeyPatch, environment: Any
) -> None:
    append(lake, 0, 0, 5)
    monkeypatch.setattr("lakehouse.catalogs.READ_ATTEMPTS", 3)
    catalog = open_catalog(lake.settings)
    failures = iter([True, True])
    proxy_rule = http._rule

    def rule(request: Request, send: Callable[[], Answer]) -> Answer:
        reads = request.method == "GET" or request.headers.get("x-amz-target", "").endswith("GetTable")
        if reads and next(failures, False):
            return error_answer(kind, 503)
        return proxy_rule(request, send)

    http.proxy.rule = rule
    assert catalog.load_table(RAW).current_snapshot() is not None
    assert next(failures, None) is None


def test_a_catalog_that_is_away_is_named_with_what_to_do(lake: Lake, kind: Kind, http: HttpWire) -> None:
    append(lake, 0, 0, 5)
    http.down = True
    with pytest.raises(Retryable, match=r"the Iceberg catalog at .*: loading raw\.records failed: .*run it again"):
        lake.load(RAW)
    with pytest.raises(Retryable, match=r"the Iceberg catalog at .*: opening raw\.records failed"):
        lake.open_for_write(RAW)


# --- the object store --------------------------------------------------------------------------------------------------


def to(part: str, answer: Answer | None, times: int = 10**9) -> Callable[[Request, Callable[[], Answer]], Answer]:
    """A rule: the first `times` writes whose path holds `part` get this answer, or none."""
    left = [times]

    def rule(request: Request, send: Callable[[], Answer]) -> Answer:
        if request.method in ("PUT", "POST") and part in request.path and left[0] > 0:
            left[0] -= 1
            if answer is None:
                raise ConnectionError
            return answer
        return send()

    return rule


def secrets_of(lake: Lake) -> set[str]:
    key = lake.settings.s3_secret_access_key
    assert key
    return {key.get_secret_value()}


@pytest.mark.parametrize(("answer", "family"), [(SLOW_DOWN, Retryable), (None, Retryable), (DENIED, Terminal)])
def test_a_data_file_that_cannot_be_written_publishes_nothing(
    lake: Lake, store: FaultProxy, answer: Answer | None, family: type[Exception]
) -> None:
    append(lake, 0, 0, 5)
    table = lake.open_for_write(RAW)
    store.rule = to("/data/", answer)
    with pytest.raises(family, match=r"raw\.records: writing data files to s3://") as failed:
        append_change(lake, table, 0, 5, 9)
    assert not any(secret in str(failed.value) for secret in secrets_of(lake))
    store.rule = to("/data/", answer, times=0)
    assert (offsets(lake), position(lake), len(stored(lake))) == (list(range(5)), 5, 1)
    append(lake, 0, 5, 9)
    assert offsets(lake) == list(range(9))


def test_a_slow_store_is_given_up_and_the_work_done_again(lake: Lake, store: FaultProxy) -> None:
    lake.settings.__dict__["s3_timeout_seconds"] = 1.0
    table = lake.open_for_write(RAW)

    def slow(request: Request, send: Callable[[], Answer]) -> Answer:
        if request.method in ("PUT", "POST") and "/data/" in request.path:
            time.sleep(2.5)
        return send()

    store.rule = slow
    with pytest.raises(Retryable, match=r"writing data files.*[Tt]ime"):
        append_change(lake, table, 0, 0, 5)
    store.reset()
    append(lake, 0, 0, 5)
    assert offsets(lake) == list(range(5))


@pytest.mark.parametrize("what", [".avro", ".metadata.json"])
def test_a_store_that_fails_while_a_commit_is_written(lake: Lake, kind: Kind, store: FaultProxy, what: str) -> None:
    """Manifests, and for Glue the metadata file, are written by us; a few failures are outlasted, the same data files land."""
    append(lake, 0, 0, 5)
    table = lake.open_for_write(RAW)
    change = append_change(lake, table, 0, 5, 9)
    store.rule = to(what, SLOW_DOWN, times=7)  # Arrow's own client tries three times
    done = commit(table, lake.run, change)
    assert done.conflicts == 0
    assert (offsets(lake), len(stored(lake))) == (list(range(9)), 2)


def test_a_store_that_stays_away_leaves_the_commit_unresolved(
    lake: Lake, store: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lakehouse.publish.MAX_ATTEMPTS", 3)
    append(lake, 0, 0, 5)
    table = lake.open_for_write(RAW)
    change = append_change(lake, table, 0, 5, 9)
    store.rule = to(".avro", None)
    with pytest.raises(CommitUnresolved, match=r"0 conflicts, 0 unknown outcomes; last: OSError"):
        commit(table, lake.run, change)
    store.rule = to(".avro", DENIED)
    with pytest.raises(Terminal, match=r"raw\.records: writing manifests was refused"):
        commit(table, lake.run, change)
    store.reset()
    commit(table, lake.run, change)
    assert offsets(lake) == list(range(9))


def test_a_query_says_that_the_store_is_away(lake: Lake, store: FaultProxy) -> None:
    append(lake, 0, 0, 5)

    def away(_request: Request, _send: Callable[[], Answer]) -> Answer:
        raise ConnectionError

    assert query(lake, "SELECT count(*) AS n FROM raw.records").to_pylist() == [{"n": 5}]
    table = lake.load(RAW)
    lake.catalog.load_table = lambda _: table  # type: ignore[method-assign, assignment]
    append_again = lake.settings.model_copy(update={"duckdb_memory": "400MB"})  # an engine that has cached nothing
    object.__setattr__(lake, "settings", append_again)
    store.rule = away
    with pytest.raises(Retryable, match=r"reading the lake failed: .*HTTP"):
        query(lake, "SELECT count(*) AS n FROM raw.records")
