"""What is rendered from the declarations: Snowflake DDL, Soda contracts, the data dictionary."""

from __future__ import annotations

import json
import logging
import re
from importlib.resources import files
from pathlib import Path

import duckdb
import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest
import sqlglot
import yaml
from sqlglot import exp

from lakehouse.checks import check_expressions
from lakehouse.declarations import Check, Column, Declaration, load_declarations
from lakehouse.errors import DeclarationError
from lakehouse.render.dictionary import render_dictionary
from lakehouse.render.snowflake import render_snowflake
from lakehouse.render.soda import render_soda_contract
from lakehouse.settings import ROOT
from lakehouse.transforms import load_transforms, upstream

DECLARATIONS = load_declarations(ROOT / "catalog")
TABLES = list(DECLARATIONS.values())
AWS = {"region": "eu-west-1", "account_id": "123456789012", "role_arn": "arn:aws:iam::123456789012:role/sf", "bucket": "lake"}

DECLARATION = """
table: billing.things
doc: "Things;\\n it's \\\\ | all"
owner: team
grain: one row a thing
primary_key: [account, thing_id]
build: {mode: insert}
partition: [{column: thing_id, transform: "bucket[4]"}]
freshness_minutes: 5
columns:
  - {name: account, type: string, doc: "no PII; at all", pii: none}
  - {name: thing_id, type: string, doc: an id, pii: pseudonymous}
  - {name: email, type: string, doc: an address, pii: restricted}
  - {name: born_on, type: date, doc: a birthday, pii: personal}
  - {name: order, type: long, doc: a word that SQL reserves, pii: none, required: true}
  - {name: status, type: string, doc: a status, pii: none, accepted: [on, "1_0", "0o7", none]}
checks:
  - {name: adult, sql: "born_on < DATE '2000-01-01'"}
  - {name: known, sql: "status IS NOT NULL"}
"""


@pytest.fixture
def declared(tmp_path: Path) -> Declaration:
    (tmp_path / "billing").mkdir()
    (tmp_path / "billing" / "things.yaml").write_text(DECLARATION.replace("[on,", '["on",'))
    return load_declarations(tmp_path)["billing.things"]


# --- Snowflake ---------------------------------------------------------------------------------------------------------

# sqlglot knows Snowflake's CREATE ICEBERG TABLE, CREATE TAG, CREATE SCHEMA / DATABASE and COMMENT ON. The others it takes as
# an opaque Command, which says nothing of their syntax: these are held to the grammar of docs.snowflake.com instead.
NAME, TEXT = r'[A-Z_]+(\.[A-Z_]+)*(\."[A-Z_]+")?', r"'([^']|'')*'"
COMMANDS = {
    "CREATE EXTERNAL VOLUME": rf"CREATE EXTERNAL VOLUME IF NOT EXISTS {NAME} STORAGE_LOCATIONS = \(\(NAME = {TEXT} "
    rf"STORAGE_PROVIDER = 'S3' STORAGE_BASE_URL = 's3://[^']+/' STORAGE_AWS_ROLE_ARN = {TEXT}\)\) ALLOW_WRITES = FALSE",
    "CREATE CATALOG INTEGRATION": rf"CREATE CATALOG INTEGRATION IF NOT EXISTS {NAME} CATALOG_SOURCE = GLUE "
    rf"TABLE_FORMAT = ICEBERG GLUE_AWS_ROLE_ARN = {TEXT} GLUE_CATALOG_ID = {TEXT} GLUE_REGION = {TEXT} ENABLED = TRUE "
    r"REFRESH_INTERVAL_SECONDS = \d+",
    "CREATE MASKING POLICY": rf"CREATE MASKING POLICY IF NOT EXISTS {NAME} AS \(val ([A-Z_]+)\) RETURNS [A-Z_]+ -> CASE .* END",
    "ALTER MASKING POLICY": rf"ALTER MASKING POLICY {NAME} SET BODY -> CASE .* END",
    "ALTER TAG": rf"ALTER TAG {NAME} SET MASKING POLICY {NAME}(, MASKING POLICY {NAME})* FORCE",
    "ALTER ICEBERG TABLE": rf'ALTER ICEBERG TABLE {NAME} MODIFY COLUMN "[A-Z0-9_]+" SET TAG {NAME} = {TEXT}',
}
PARSED = {exp.Create, exp.Comment}


# sqlglot reads these, but lets any property pass
CREATE_TABLE = (
    rf"CREATE ICEBERG TABLE IF NOT EXISTS {NAME} EXTERNAL_VOLUME = {TEXT} CATALOG = {TEXT} CATALOG_TABLE_NAME = {TEXT} "
)
CREATE_TABLE += rf"CATALOG_NAMESPACE = {TEXT} AUTO_REFRESH = TRUE;"


def statements(ddl: str) -> list[exp.Expr]:
    return [s for s in sqlglot.parse(ddl, dialect="snowflake") if s is not None]


def plain(command: exp.Expr) -> str:
    """A Command's text in one line, without the script's comments before it."""
    return " ".join(command.sql("snowflake", comments=False).split())


def tags(ddl: str) -> dict[tuple[str, str], str]:
    """{(table, column): PII class} as the script sets them."""
    found = re.findall(r'ALTER ICEBERG TABLE \w+\.(\S+) MODIFY COLUMN "(\w+)" SET TAG \S+ = \'(\w+)\'', ddl)
    return {(table.lower(), column.lower()): pii for table, column, pii in found}


@pytest.mark.filterwarnings("ignore")
def test_every_snowflake_statement_is_valid() -> None:
    found = statements(render_snowflake(DECLARATIONS, **AWS))
    assert {type(s) for s in found} == {*PARSED, exp.Command}
    kinds = set()
    for command in (s for s in found if isinstance(s, exp.Command)):
        text = plain(command)
        kind = next((k for k in COMMANDS if text.startswith(k)), None)
        assert kind, text
        assert re.fullmatch(COMMANDS[kind], text), text
        kinds.add(kind)
        if "->" in text:  # the body of a policy is an expression, and those sqlglot knows
            assert isinstance(sqlglot.parse_one(text.partition("->")[2], dialect="snowflake"), exp.Case)
    assert kinds == set(COMMANDS)


def test_every_table_and_column_is_in_the_snowflake_script() -> None:
    found = statements(render_snowflake(DECLARATIONS, **AWS))
    created_as = re.findall(r"CREATE ICEBERG TABLE.*?;", render_snowflake(DECLARATIONS, **AWS), re.DOTALL)
    assert all(re.fullmatch(CREATE_TABLE, " ".join(text.split())) for text in created_as)
    created = {s.this.sql().lower(): s for s in found if isinstance(s, exp.Create) and s.kind == "TABLE"}
    assert set(created) == {f"streamforge.{name}" for name in DECLARATIONS}
    for declared in TABLES:
        properties = {
            p.name: p.args["value"].name for p in created[f"streamforge.{declared.table}"].find_all(exp.Property) if p.name
        }
        assert properties["CATALOG_NAMESPACE"] == declared.layer
        assert properties["CATALOG_TABLE_NAME"] == declared.name
        assert {"EXTERNAL_VOLUME", "CATALOG", "AUTO_REFRESH"} <= set(properties)
    comments = {s.this.sql().replace('"', "").lower(): s.expression.this for s in found if isinstance(s, exp.Comment)}
    expected = {f"streamforge.{d.table}.{c.name}": " ".join(c.doc.split()) for d in TABLES for c in d.columns}
    assert {k: v for k, v in comments.items() if k in expected} == expected
    assert set(comments) - set(expected) == set(created)


def test_every_class_of_pii_is_tagged_and_none_is_not(declared: Declaration) -> None:
    assert tags(render_snowflake(DECLARATIONS)) == {
        (d.table, c.name): c.pii for d in TABLES for c in d.columns if c.pii != "none"
    }
    assert tags(render_snowflake({declared.table: declared})) == {
        ("billing.things", "thing_id"): "pseudonymous",
        ("billing.things", "email"): "restricted",
        ("billing.things", "born_on"): "personal",
    }


def test_a_policy_masks_each_type_that_is_personal_or_restricted(declared: Declaration) -> None:
    ddl = render_snowflake({declared.table: declared})
    assert re.findall(r"CREATE MASKING POLICY IF NOT EXISTS \S+ AS \(val (\w+)\) RETURNS (\w+)", ddl) == [
        ("DATE", "DATE"),
        ("VARCHAR", "VARCHAR"),
    ]
    assert (
        "ALTER TAG STREAMFORGE.GOVERNANCE.PII SET MASKING POLICY STREAMFORGE.GOVERNANCE.PII_DATE, "
        "MASKING POLICY STREAMFORGE.GOVERNANCE.PII_VARCHAR FORCE;" in ddl
    )
    assert ddl.index("SET MASKING POLICY") < ddl.index("CREATE ICEBERG TABLE")  # no table is there before its mask
    unclassified = msgspec.structs.replace(declared, columns=[c for c in declared.columns if c.pii == "none"])
    assert "MASKING POLICY" not in render_snowflake({"x": unclassified})


def who_reads(pii: str, roles: set[str]) -> bool:
    """Run the policy's own CASE in DuckDB, with Snowflake's two functions answered for a class and a session."""
    ddl = render_snowflake(DECLARATIONS)
    body = re.search(r"SET BODY ->\s+(CASE.*?END);", ddl, re.DOTALL)
    assert body
    case = sqlglot.parse_one(body[1].replace("SYSTEM$GET_TAG_ON_CURRENT_COLUMN", "TAG_HERE"), dialect="snowflake")

    def answer(node: exp.Expr) -> exp.Expr:
        if isinstance(node, exp.Anonymous) and node.name == "TAG_HERE":
            assert node.expressions[0].name == "STREAMFORGE.GOVERNANCE.PII"
            return exp.Literal.string(pii)
        if isinstance(node, exp.Anonymous) and node.name == "IS_ROLE_IN_SESSION":
            return exp.true() if node.expressions[0].name in roles else exp.false()
        return node

    row = duckdb.connect().execute(f"SELECT {case.transform(answer).sql('duckdb')} FROM (SELECT 'clear' AS val)").fetchone()
    assert row in [("clear",), (None,)]
    return row == ("clear",)


@pytest.mark.parametrize(
    ("pii", "readers"),
    [
        ("none", [set(), {"PII_PERSONAL"}, {"PII_RESTRICTED"}]),
        ("pseudonymous", [set(), {"PII_PERSONAL"}, {"PII_RESTRICTED"}]),
        ("personal", [{"PII_PERSONAL"}]),
        ("restricted", [{"PII_RESTRICTED"}]),
        ("a class of tomorrow", []),
    ],
)
def test_who_reads_a_class_in_clear(pii: str, readers: list[set[str]]) -> None:
    sessions: list[set[str]] = [set(), {"PII_PERSONAL"}, {"PII_RESTRICTED"}]
    assert [s for s in sessions if who_reads(pii, s)] == readers


def test_pii_of_a_type_that_cannot_be_masked_is_refused(declared: Declaration) -> None:
    for kind in ("decimal(9, 2)", {"type": "list", "element": "string"}):
        column = Column("secrets", kind, "x", "restricted")
        with pytest.raises(DeclarationError, match=r"things\.yaml: column 'secrets' is restricted"):
            render_snowflake({"x": msgspec.structs.replace(declared, columns=[*declared.columns, column])})


def test_text_cannot_break_out_of_its_literal(declared: Declaration) -> None:
    ddl = render_snowflake({declared.table: declared}, bucket="b'; DROP TABLE x; --")
    comment = next(s for s in statements(ddl) if isinstance(s, exp.Comment) and s.args["kind"] == "TABLE")
    assert comment.expression.this == "Things; it's \\ | all Grain: one row a thing. Owner: team."
    assert not [s for s in statements(ddl) if isinstance(s, exp.Drop)]


def test_arguments_take_the_place_of_placeholders() -> None:
    assert set(re.findall(r"<\w+>", render_snowflake(DECLARATIONS))) == {
        "<AWS_REGION>", "<AWS_ACCOUNT_ID>", "<SNOWFLAKE_ROLE_ARN>", "<BUCKET>"
    }  # fmt: skip
    ddl = render_snowflake(DECLARATIONS, **AWS, database="LAKE")
    assert "<" not in ddl
    assert "STREAMFORGE." not in ddl
    assert all(value in ddl for value in AWS.values())


# --- Soda --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", TABLES, ids=lambda d: d.table)
def test_a_contract_has_every_column_and_every_rule_of_the_checks(declared: Declaration) -> None:
    contract = yaml.safe_load(render_soda_contract(declared))
    assert contract["dataset"] == f"lakehouse/{declared.layer}/{declared.name}"
    assert [c["name"] for c in contract["columns"]] == declared.column_names
    checks = [*contract["checks"], *(k for c in contract["columns"] for k in c.get("checks", []))]
    names = [next(iter(check.values()))["name"] for check in checks]
    assert sorted(names) == sorted([*check_expressions(declared), "row_count"])


@pytest.mark.parametrize("declared", TABLES, ids=lambda d: d.table)
def test_a_contract_keeps_to_soda_s_own_json_schema(declared: Declaration) -> None:
    """Soda itself ignores a key that it does not know, silently."""
    schema = json.loads(files("soda_core.contracts").joinpath("soda_data_contract_json_schema_1_0_0.json").read_text("utf-8"))
    contract = yaml.safe_load(render_soda_contract(declared))
    assert [e.message for e in jsonschema.Draft202012Validator(schema).iter_errors(contract)] == []


@pytest.mark.parametrize("declared", TABLES, ids=lambda d: d.table)
def test_soda_reads_the_contract_without_a_complaint(declared: Declaration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SODA_CORE_TELEMETRY_ENABLED", "false")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # Soda adds one, for good
    from soda_core.common.logs import Logs
    from soda_core.common.yaml import ContractYamlSource
    from soda_core.contracts.impl.contract_yaml import ContractYaml

    logs = Logs()
    ContractYaml.parse(ContractYamlSource.from_str(render_soda_contract(declared)), provided_variable_values={})
    assert [r.getMessage() for r in logs.get_log_records() if r.levelname in ("WARNING", "ERROR")] == []


def test_a_contract_in_full(declared: Declaration) -> None:
    contract = yaml.safe_load(render_soda_contract(declared))
    columns = {c["name"]: c.get("checks") for c in contract["columns"]}
    assert columns == {
        "account": [{"missing": {"name": "not_null(account)"}}],
        "thing_id": [{"missing": {"name": "not_null(thing_id)"}}],
        "email": None,
        "born_on": None,
        "order": [{"missing": {"name": "not_null(order)"}}],
        "status": [{"invalid": {"name": "accepted(status)", "valid_values": ["on", "1_0", "0o7", "none"]}}],
    }
    assert contract["checks"] == [
        {"row_count": {"name": "row_count", "threshold": {"must_be_greater_than_or_equal": 0}}},
        {"duplicate": {"name": 'unique("account", "thing_id")', "columns": ["account", "thing_id"]}},
        {"failed_rows": {"name": "adult", "qualifier": "adult", "expression": "(born_on < DATE '2000-01-01') IS NOT TRUE"}},
        {"failed_rows": {"name": "known", "qualifier": "known", "expression": "(status IS NOT NULL) IS NOT TRUE"}},
    ]


def test_accepted_values_stay_text_in_yaml_1_2(declared: Declaration) -> None:
    from ruamel.yaml import YAML

    contract = YAML(typ="safe").load(render_soda_contract(declared))
    status = next(c for c in contract["columns"] if c["name"] == "status")
    assert status["checks"][0]["invalid"]["valid_values"] == ["on", "1_0", "0o7", "none"]


@pytest.mark.parametrize(
    ("mode", "minutes", "least"), [("append", 5, 1), ("append", None, 0), ("insert", 5, 0), ("merge", 5, 0), ("replace", 60, 0)]
)
def test_which_tables_may_be_empty(declared: Declaration, mode: str, minutes: int | None, least: int) -> None:
    build = msgspec.structs.replace(declared.build, mode=mode)
    contract = render_soda_contract(msgspec.structs.replace(declared, build=build, freshness_minutes=minutes))
    assert yaml.safe_load(contract)["checks"][0]["row_count"]["threshold"] == {"must_be_greater_than_or_equal": least}


def test_a_check_that_soda_would_rewrite_is_refused(declared: Declaration) -> None:
    check = Check("price", "status <> '${env.HOME}'")
    with pytest.raises(DeclarationError, match=r"things\.yaml: check 'price'"):
        render_soda_contract(msgspec.structs.replace(declared, checks=[check]))


# --- dictionary --------------------------------------------------------------------------------------------------------


def test_the_dictionary_has_every_table_and_column() -> None:
    transforms = load_transforms(ROOT / "transforms", DECLARATIONS)
    page = render_dictionary(DECLARATIONS, transforms)
    sections = {s.partition("\n")[0]: s for s in page.split("\n## ")[1:]}
    assert list(sections) == list(DECLARATIONS)
    for declared in TABLES:
        section = sections[declared.table]
        assert " ".join(declared.doc.split()) in section
        assert f"- **grain**: {declared.grain}" in section
        assert f"- **owner**: {declared.owner}" in section
        rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (yes|) \| (\w+) \| (.*) \|$", section, re.MULTILINE)
        assert [(name, required == "yes", pii) for name, _, required, pii, _ in rows] == [
            (c.name, c.required or c.name in declared.primary_key, c.pii) for c in declared.columns
        ]
        if transform := transforms.get(declared.table):
            made_from = next(line for line in section.splitlines() if line.startswith("- **made from**"))
            assert re.findall(r"\[([\w.]+)\]", made_from) == list(upstream(declared, transform))


def test_a_section_of_the_dictionary(declared: Declaration) -> None:
    section = render_dictionary({declared.table: declared}, {}).partition("## billing.things")[2]
    assert "Things; it's \\ | all\n" in section  # a pipe is text outside of a table
    assert "- **key**: `account`, `thing_id`" in section
    assert "- **partitioned by**: `bucket[4](thing_id)`" in section
    assert "- **retention**: for ever" in section
    assert "- **freshness**: 5 minutes" in section
    assert "- **check** `adult`: `born_on < DATE '2000-01-01'`" in section
    assert "| `email` | `string` |  | restricted | an address |" in section
    assert "| `status` | `string` |  | none | a status. One of: `on`, `1_0`, `0o7`, `none` |" in section


def test_rendering_is_deterministic() -> None:
    again = load_declarations(ROOT / "catalog")
    transforms = load_transforms(ROOT / "transforms", again)
    assert render_snowflake(again) == render_snowflake(DECLARATIONS)
    assert render_dictionary(again, transforms) == render_dictionary(DECLARATIONS, transforms)
    assert [render_soda_contract(d) for d in again.values()] == [render_soda_contract(d) for d in TABLES]
