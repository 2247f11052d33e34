"""Declarations are loaded strictly: one clear error that names the file and the column, and nothing silently dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pyiceberg.transforms import BucketTransform, DayTransform, IdentityTransform
from pyiceberg.types import BinaryType, DecimalType, ListType, LongType, StringType, StructType, TimestamptzType

from lakehouse.declarations import LAYERS, get_table, load_declarations, load_reference
from lakehouse.errors import DeclarationError, UsageError
from lakehouse.lake import Lake
from lakehouse.settings import ROOT

THINGS = """
table: billing.things
doc: things
owner: team
grain: one row a thing
primary_key: [account, thing_id]
build: {mode: merge, driver: raw.source, by: {thing_id: id}}
partition:
  - {column: thing_id, transform: "bucket[4]"}
  - {column: began_at, transform: day}
  - {column: account}
sort: [thing_id, began_at]
columns:
  - {name: account, type: string, doc: account, pii: none}
  - {name: thing_id, type: string, doc: id, pii: pseudonymous}
  - {use: began_at, required: true}
  - {name: amount, type: "decimal(18, 2)", doc: amount, pii: none, accepted: ["1"]}
  - name: headers
    type: {type: list, element: {type: struct, fields: [{name: key, type: string, required: true}, {name: value, type: binary}]}}
    doc: headers
    pii: personal
  - {name: count, type: long, doc: how many, pii: none}
"""
SOURCE = """
table: raw.source
doc: source
owner: team
grain: one row a record
primary_key: [id]
build: {mode: append}
columns:
  - {name: id, type: string, doc: id, pii: none}
"""
SHARED = """
columns:
  - {name: began_at, type: timestamptz, doc: start, pii: none}
"""

Load = Callable[..., object]


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    for place, text in {"billing/things.yaml": THINGS, "raw/source.yaml": SOURCE, "columns.yaml": SHARED}.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
    return tmp_path


# --- the real ones -----------------------------------------------------------------------------------------------------


def test_the_real_catalog_loads_in_the_order_of_the_layers() -> None:
    found = load_declarations(ROOT / "catalog")
    assert set(found) == {f"{p.parent.name}.{p.stem}" for p in (ROOT / "catalog").glob("*/*.yaml") if p.parent.name in LAYERS}
    assert list(found) == sorted(found, key=lambda name: (LAYERS.index(name.partition(".")[0]), name))
    for declared in found.values():
        schema = declared.schema()
        assert [schema.find_field(i).name for i in schema.identifier_field_ids] == [
            c for c in declared.column_names if c in declared.primary_key
        ]
        assert len(declared.partition_spec(schema).fields) == len(declared.partition)


def test_the_same_quantity_has_the_same_type_in_every_table() -> None:
    types: dict[str, set[str]] = {}
    for declared in load_declarations(ROOT / "catalog").values():
        for column in declared.columns:
            types.setdefault(column.name, set()).add(str(column.type))
    assert {name: found for name, found in types.items() if len(found) > 1} == {}


def test_the_real_catalog_can_be_created(tmp_path: Path) -> None:
    from lakehouse.lake import Run, open_lake
    from lakehouse.settings import Settings

    lake = open_lake(Settings(home=tmp_path, catalog_dir=ROOT / "catalog"), Run("test", "test"))
    for name, declared in lake.declarations.items():
        table = lake.open_for_write(name)
        assert table.schema().column_names == declared.schema().column_names
        assert len(table.sort_order().fields) == len(declared.sort)


# --- what is rendered from one -----------------------------------------------------------------------------------------


def test_schema_spec_and_order_are_as_declared(catalog: Path) -> None:
    declared = load_declarations(catalog)["billing.things"]
    schema = declared.schema()
    assert (declared.layer, declared.name) == ("billing", "things")
    assert [(f.field_id, f.name, f.required, f.doc) for f in schema.fields] == [
        (1, "account", True, "account"),  # a key column is required
        (2, "thing_id", True, "id"),
        (3, "began_at", True, "start"),  # `required` beside `use` overrides
        (4, "amount", False, "amount"),
        (5, "headers", False, "headers"),
        (6, "count", False, "how many"),
    ]
    assert schema.find_type("began_at") == TimestamptzType()
    assert schema.find_type("amount") == DecimalType(18, 2)
    assert schema.find_type("count") == LongType()
    assert sorted(schema.identifier_field_ids) == [1, 2]

    spec = declared.partition_spec(schema)
    assert [(f.name, f.source_id, f.transform) for f in spec.fields] == [
        ("thing_id_bucket", 2, BucketTransform(4)),
        ("began_at_day", 3, DayTransform()),
        ("account", 1, IdentityTransform()),
    ]
    assert [(f.source_id, str(f.direction)) for f in declared.sort_order(schema).fields] == [(2, "ASC"), (3, "ASC")]


def test_nested_types_have_ids_of_their_own(catalog: Path) -> None:
    schema = load_declarations(catalog)["billing.things"].schema()
    headers = schema.find_type("headers")
    assert isinstance(headers, ListType)
    assert isinstance(headers.element_type, StructType)
    assert [(f.name, f.required, f.field_type) for f in headers.element_type.fields] == [
        ("key", True, StringType()),
        ("value", False, BinaryType()),
    ]
    ids = [headers.element_id, *(f.field_id for f in headers.element_type.fields)]
    assert sorted([*(f.field_id for f in schema.fields), *ids]) == list(range(1, 10))


def test_a_created_table_is_what_was_declared(lake: Lake) -> None:
    table = lake.open_for_write("billing.things")
    assert [f.name for f in table.spec().fields] == ["thing_id_bucket", "region"]
    assert table.schema().find_field("status").required
    assert table.sort_order().fields[0].source_id == table.schema().find_field("thing_id").field_id
    assert (table.properties["owner"], table.properties["comment"]) == ("tests", "things, each once")
    before = table.metadata_location
    assert lake.open_for_write("billing.things").metadata_location == before


# --- what is refused ---------------------------------------------------------------------------------------------------

WRONG = {
    "unknown key": ("owner: team", "owner: team\nowned_by: team", "unknown field `owned_by`"),
    "unknown key of a column": ("doc: account,", "doc: account, piii: none,", "unknown field `piii`.*'account'"),
    "unknown key of a build": ("mode: merge,", "mode: merge, drivers: x,", "unknown field `drivers`.*build"),
    "unknown key of a nested type": ("{type: list,", "{type: list, items: string,", "column 'headers': unknown type"),
    "missing key": ("owner: team\n", "", "missing required field `owner`"),
    "unknown build mode": ("mode: merge", "mode: upsert", "Invalid enum value 'upsert'.*build.mode"),
    "unknown type": ("type: long", "type: bigint", "column 'count': unknown type 'bigint'"),
    "type of Iceberg v3": ("type: long", "type: timestamptz_ns", "column 'count': unknown type 'timestamptz_ns'"),
    "wrong decimal": ("decimal(18, 2)", "decimal(99, 2)", "column 'amount': unknown type"),
    "unknown nested type": ("{type: list,", "{type: map,", "column 'headers': unknown type"),
    "unknown type in a nested one": ("name: value, type: binary", "name: value, type: blob", "column 'headers': unknown type"),
    "unknown transform": ("transform: day", "transform: daily", "partition on 'began_at': transform 'daily' is unknown"),
    "transform that does not fit": ('"bucket[4]"', "day", "partition on 'thing_id': transform 'day'.*does not fit its type"),
    "missing pii": ("doc: how many, pii: none", "doc: how many", "column 'count' has no PII class"),
    "wrong pii": ("doc: how many, pii: none", "doc: how many, pii: secret", "'secret'.*column 'count'"),
    "missing doc": ("doc: how many, ", "", "column 'count' has no `doc:`"),
    "missing name": ("{name: count, ", "{", "column '#5' has no `name:`"),
    "wrong required": ("doc: how many,", "doc: how many, required: 1,", "Expected `bool`.*column 'count'"),
    "no key": ("[account, thing_id]", "[]", "primary_key is empty"),
    "key not declared": ("[account, thing_id]", "[acount]", "primary_key names column 'acount'.*did you mean 'account'"),
    "sort not declared": ("sort: [thing_id,", "sort: [when,", "sort names column 'when', which is not declared"),
    "partition not declared": ("{column: account}", "{column: acct}", "partition names column 'acct'"),
    "merged by a column not declared": ("{thing_id: id}", "{thing: id}", "build.by names column 'thing'"),
    "doubled column": ("name: count", "name: amount", "column 'amount' is declared twice"),
    "doubled key": ("doc: how many,", "doc: how many, doc: again,", "line 22: key 'doc' comes twice"),
    "doubled partition": ("{column: account}", '{column: thing_id, transform: "bucket[8]"}', "partition field 'thing_id_bucket'"),
    "partition named like a column": ("name: count", "name: began_at_day", "partition field 'began_at_day'"),
    "wrong place": ("billing.things", "billing.thing", "table is 'billing.thing', but the file's place says 'billing.things'"),
    "unknown shared column": ("use: began_at", "use: begun_at", "column 'begun_at' is not in columns.yaml"),
    "shared column that is no name": ("use: began_at", "use: [began_at]", "is not in columns.yaml"),
    "broken YAML": ("sort: [thing_id", "sort: [[thing_id", "not valid YAML at line 13"),
    "no mapping": (THINGS, "- a\n- b\n", "a declaration is a mapping with a list `columns`"),
    "empty file": (THINGS, "", "a declaration is a mapping with a list `columns`"),
    "column that is no mapping": ("{use: began_at, required: true}", "began_at", r"columns\[2\] is not a mapping"),
    "unknown driver": ("driver: raw.source", "driver: raw.sauce", "build.driver 'raw.sauce' is not a declared table"),
    "merge without by": (", by: {thing_id: id}", "", "build.mode merge needs `driver` and `by`"),
    "merge without driver": ("driver: raw.source, ", "", "build.mode merge needs `driver` and `by`"),
    "merge that cannot find its keys": ("by: {thing_id: id}", "by: {count: id}", "first partition column that is one of `by`"),
}


@pytest.mark.parametrize(("old", "new", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_declaration_is_refused(catalog: Path, old: str, new: str, message: str) -> None:
    path = catalog / "billing" / "things.yaml"
    assert THINGS.count(old) >= 1
    path.write_text(THINGS.replace(old, new, 1))
    with pytest.raises(DeclarationError, match=message) as refused:
        load_declarations(catalog)
    assert str(refused.value).startswith(f"{path}: ")
    assert len(str(refused.value).splitlines()) == 1


WRONG_SHARED = {
    "unknown type of pii": ("pii: none", "pii: nil", "'nil'.*column 'began_at'"),
    "missing pii": (", pii: none", "", "column 'began_at' has no PII class"),
    "unknown key": ("doc: start", "doc: start, unit: s", "unknown field `unit`.*column 'began_at'"),
    "doubled": ("\n  - ", "\n  - {name: began_at, type: string, doc: x, pii: none}\n  - ", "column 'began_at' is declared twice"),
    "broken YAML": ("columns:", "columns: [", "not valid YAML"),
    "no mapping": (SHARED, "", "a mapping with a list `columns`"),
}


@pytest.mark.parametrize(("old", "new", "message"), WRONG_SHARED.values(), ids=WRONG_SHARED)
def test_a_wrong_shared_column_is_refused(catalog: Path, old: str, new: str, message: str) -> None:
    path = catalog / "columns.yaml"
    path.write_text(SHARED.replace(old, new, 1))
    with pytest.raises(DeclarationError, match=message) as refused:
        load_declarations(catalog)
    assert str(refused.value).startswith(f"{path}: ")


def test_a_file_that_is_not_text_is_refused(catalog: Path) -> None:
    (catalog / "raw" / "source.yaml").write_bytes(b"\xff\xfe\x00table")
    with pytest.raises(DeclarationError, match=r"source\.yaml: not valid YAML"):
        load_declarations(catalog)


def test_a_folder_without_declarations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"LAKEHOUSE_CATALOG_DIR: .* is not a folder"):
        load_declarations(tmp_path / "none")
    with pytest.raises(DeclarationError, match="no declarations found"):
        load_declarations(tmp_path)


def test_an_unknown_table_is_told_the_closest_one(catalog: Path) -> None:
    tables = load_declarations(catalog)
    assert get_table(tables, "raw.source").table == "raw.source"
    with pytest.raises(UsageError, match=r"no table 'billing.thing'; did you mean billing\.things\?"):
        get_table(tables, "billing.thing")
    with pytest.raises(UsageError, match="lakehouse status"):
        get_table(tables, "zzz")


def test_reference_data(catalog: Path) -> None:
    assert load_reference(ROOT / "catalog", "plans")
    with pytest.raises(DeclarationError, match=r"reference/planz\.yaml: no such reference data"):
        load_reference(catalog, "planz")
