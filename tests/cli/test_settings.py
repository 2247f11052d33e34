"""Wrong settings and broken declarations: one message that names the variable, or file and column; nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Ran

from lakehouse.settings import ROOT, Settings

SECRET = "whsec_do_not_show_me"


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("LAKEHOUSE_HOEM", "x", "LAKEHOUSE_HOEM: no such setting; did you mean LAKEHOUSE_HOME?"),
        ("LAKEHOUSE_BATCH_ROWS", "many", "LAKEHOUSE_BATCH_ROWS: Input should be a valid integer"),
        ("LAKEHOUSE_BATCH_ROWS", "0", "LAKEHOUSE_BATCH_ROWS: Input should be greater than or equal to 1"),
        ("LAKEHOUSE_WEBHOOK_PORT", "70000", "LAKEHOUSE_WEBHOOK_PORT: Input should be less than or equal to 65535"),
        ("LAKEHOUSE_PROFILE", "aws", "LAKEHOUSE_PROFILE: the profile 'aws' needs LAKEHOUSE_WAREHOUSE, LAKEHOUSE_KAFKA_BOOTSTRAP"),
        ("LAKEHOUSE_KAFKA_PASSWORD", SECRET, "LAKEHOUSE_KAFKA_SECURITY_PROTOCOL: must be SASL_SSL or SASL_PLAINTEXT"),
        ("LAKEHOUSE_WAREHOUSE", "gs://bucket", "LAKEHOUSE_WAREHOUSE: must begin with file:/// or s3://"),
        ("LAKEHOUSE_CRM_URL", SECRET, "LAKEHOUSE_CRM_URL: not an SQLAlchemy URL"),
        ("LAKEHOUSE_PROFILE", "prod", "LAKEHOUSE_PROFILE: Input should be 'embedded', 'local' or 'aws'"),
        ("LAKEHOUSE_WEBHOOK_SECRETS", SECRET, "LAKEHOUSE_WEBHOOK_SECRETS: not a JSON list"),
        ("LAKEHOUSE_WEBHOOK_SECRETS", f'{{"a": "{SECRET}"}}', "LAKEHOUSE_WEBHOOK_SECRETS: Input should be a valid list"),
        ("LAKEHOUSE_WEBHOOK_SECRETS", f'[["{SECRET}"]]', "LAKEHOUSE_WEBHOOK_SECRETS.0: Input should be a valid string"),
        ("LAKEHOUSE_DUCKDB_MEMORY", "lots", "LAKEHOUSE_DUCKDB_MEMORY: a number and a unit, such as 512MB"),
        ("LAKEHOUSE_CATALOG_URI", f"postgres://me:{SECRET}@db/lake", "LAKEHOUSE_CATALOG_URI: the URI begins with sqlite:///"),
        ("LAKEHOUSE_HOME", __file__, "LAKEHOUSE_HOME: a file is there, not a folder"),
        ("LAKEHOUSE_CATALOG_DIR", "/no/such/folder", "LAKEHOUSE_CATALOG_DIR: /no/such/folder is not a folder"),
    ],
)
def test_a_wrong_setting_is_named_and_its_value_is_not(
    call: Callable[..., Ran], tmp_path: Path, variable: str, value: str, said: str
) -> None:
    for command in (["status"], ["demo"], ["up"], ["run"], ["sql", "SELECT 1"]):
        assert SECRET not in call(*command, **{variable: value}).failed(2, said).err
    assert not (tmp_path / "home").exists()


def test_all_that_is_wrong_is_said_at_once(call: Callable[..., Ran]) -> None:
    wrong = {"LAKEHOUSE_X": "1", "LAKEHOUSE_BATCH_ROWS": "x", "LAKEHOUSE_WEBHOOK_PORT": "-1"}
    call("status", **wrong).failed(2, *wrong, "See: lakehouse settings")


def test_settings_shows_what_can_be_set_even_if_some_is_wrong(call: Callable[..., Ran]) -> None:
    ran = call("settings", LAKEHOUSE_HOEM="x", COLUMNS="200")
    assert ran.code == 2
    assert "did you mean LAKEHOUSE_HOME?" in ran.err
    for name in Settings.model_fields:
        assert f"LAKEHOUSE_{name.upper()}" in ran.out


def test_settings_says_what_is_set_and_hides_secrets(call: Callable[..., Ran], tmp_path: Path) -> None:
    secret = {
        "LAKEHOUSE_WEBHOOK_SECRETS": f'["{SECRET}"]',
        "LAKEHOUSE_CRM_URL": f"postgresql://reader:{SECRET}@crm:5432/crm",
        "LAKEHOUSE_CATALOG_URI": f"https://lake:{SECRET}@catalog/api",
        "LAKEHOUSE_CATALOG_CREDENTIAL": f"client:{SECRET}",
        "LAKEHOUSE_CATALOG_TOKEN": SECRET,
        "LAKEHOUSE_S3_SECRET_ACCESS_KEY": SECRET,
        "LAKEHOUSE_S3_SESSION_TOKEN": SECRET,
        "LAKEHOUSE_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "LAKEHOUSE_KAFKA_SASL_MECHANISM": "PLAIN",
        "LAKEHOUSE_KAFKA_USERNAME": "lake",
        "LAKEHOUSE_KAFKA_PASSWORD": SECRET,
    }
    for how in ([], ["--json"]):
        ran = call("settings", *how, **secret).fine()
        assert SECRET not in ran.out + ran.err
    rows = {r["variable"]: r for r in ran.json}
    assert rows["LAKEHOUSE_CRM_URL"]["value"] == "postgresql://reader:***@crm:5432/crm"
    assert rows["LAKEHOUSE_HOME"] | {"meaning": ""} == {
        "variable": "LAKEHOUSE_HOME",
        "value": str(tmp_path / "home"),
        "set": True,
        "meaning": "",
    }
    assert rows["LAKEHOUSE_BATCH_ROWS"]["set"] is False
    assert "LAKEHOUSE_HOME*" in call("settings").out


def test_an_empty_variable_is_as_good_as_none(call: Callable[..., Ran]) -> None:
    rows = {r["variable"]: r["value"] for r in call("settings", "--json", LAKEHOUSE_HOME="", LAKEHOUSE_BATCH_ROWS="").fine().json}
    assert Path(rows["LAKEHOUSE_HOME"]).name == ".lakehouse"
    assert rows["LAKEHOUSE_BATCH_ROWS"] == 50_000


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of catalog/ to break."""
    copy = tmp_path / "catalog"
    shutil.copytree(ROOT / "catalog", copy)
    monkeypatch.setenv("LAKEHOUSE_CATALOG_DIR", str(copy))
    return copy


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: event_name, type: string", "name: event_name, type: strnig", "column 'event_name': unknown type 'strnig'"),
        (
            "name: event_name, type: string, required: true, pii: none",
            "name: event_name, type: string",
            "'event_name' has no PII",
        ),
        (
            "table: product.events",
            "table: product.clicks",
            "table is 'product.clicks', but the file's place says 'product.events'",
        ),
        ("primary_key: [event_id, ", "primary_key: [evnt_id, ", "primary_key names column 'evnt_id', which is not declared"),
        ("grain:", "grian:", "grian"),
        ("doc:", "doc: [", "not valid YAML"),
    ],
)
def test_a_broken_declaration_is_named_with_file_and_column(
    call: Callable[..., Ran], tmp_path: Path, catalog: Path, old: str, new: str, said: str
) -> None:
    file = catalog / "product" / "events.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    for command in (["status"], ["demo"], ["up"], ["run"], ["render", "soda", "--to", str(tmp_path / "out")]):
        call(*command).failed(1, str(file), said)
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "out").exists()


def test_a_declaration_that_cannot_be_read(call: Callable[..., Ran], tmp_path: Path, catalog: Path) -> None:
    (catalog / "product" / "more.yaml").mkdir()  # root may read any file, but not a folder
    call("status").failed(1, str(catalog / "product" / "more.yaml"), "Is a directory")
    assert not (tmp_path / "home").exists()


def test_a_broken_declaration_does_not_keep_anybody_from_starting_over(
    call: Callable[..., Ran], tmp_path: Path, catalog: Path
) -> None:
    call("status").fine()
    (catalog / "product" / "events.yaml").write_text("nonsense")
    call("clean", "--yes").fine()
    assert not (tmp_path / "home").exists()


def test_a_home_that_cannot_be_made(call: Callable[..., Ran]) -> None:
    for command in (["status"], ["demo"], ["up"], ["sql", "SELECT count(*) FROM product.events"]):
        call(*command, LAKEHOUSE_HOME="/proc/lakehouse").failed(1, "/proc/lakehouse", "No such file or directory")


def test_a_catalog_database_that_is_none(call: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "catalog.db").write_text("this is no database, but long enough to be taken for one" * 100)
    call("status").failed(1, "file is not a database", "lakehouse settings")
