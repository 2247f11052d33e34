"""A declaration that changes: what the table follows by itself, and what is refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lakehouse.commit import commit
from lakehouse.errors import Terminal
from lakehouse.lake import Lake, newest_within
from lakehouse.queries import query
from tests.faults.records import RAW, append, append_change

DECLARED = "catalog/raw/records.yaml"


def redeclare(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / DECLARED
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def test_a_new_column_is_added_and_old_rows_have_null(lake: Lake, reopen: Callable[[str], Lake], tmp_path: Path) -> None:
    append(lake, 0, 0, 3)
    redeclare(tmp_path, "  - {name: value", "  - {name: extra, type: string, pii: none, doc: e}\n  - {name: value")
    again = reopen("again")
    again.open_for_write(RAW)
    append(again, 0, 3, 5)
    assert query(again, f"SELECT count(*) AS n, count(extra) AS extra FROM {RAW}").to_pylist() == [{"n": 5, "extra": 0}]
    # opening again is no further change
    location = again.open_for_write(RAW).metadata_location
    assert again.open_for_write(RAW).metadata_location == location


def test_a_schema_change_that_is_overtaken_is_made_again(lake: Lake, reopen: Callable[[str], Lake], tmp_path: Path) -> None:
    append(lake, 0, 0, 3)
    redeclare(tmp_path, "  - {name: value", "  - {name: extra, type: string, pii: none, doc: e}\n  - {name: value")
    one, other = reopen("one"), reopen("other")
    real = one.catalog.commit_table

    def overtaken(*arguments: object) -> object:
        one.catalog.commit_table = real  # type: ignore[method-assign]
        other.open_for_write(RAW)
        return real(*arguments)  # type: ignore[arg-type]

    one.catalog.commit_table = overtaken  # type: ignore[method-assign, assignment]
    assert "extra" in one.open_for_write(RAW).schema().column_names


def test_a_type_is_widened_and_any_other_change_refused(lake: Lake, reopen: Callable[[str], Lake], tmp_path: Path) -> None:
    append(lake, 0, 0, 3)
    redeclare(tmp_path, "{name: partition, type: int", "{name: partition, type: long")
    assert str(reopen("wider").open_for_write(RAW).schema().find_type("partition")) == "long"
    redeclare(tmp_path, "{name: value, type: string", "{name: value, type: long")
    with pytest.raises(Terminal, match=r"records\.yaml"):
        reopen("other").open_for_write(RAW)


def test_a_column_that_need_not_be_there_any_more_may_be_null(lake: Lake, reopen: Callable[[str], Lake], tmp_path: Path) -> None:
    append(lake, 0, 0, 3)
    redeclare(tmp_path, "type: timestamptz, required: true", "type: timestamptz")
    fields = reopen("optional").open_for_write(RAW).schema().fields
    assert [f.name for f in lake.load(RAW).schema().fields if f.required] == [f.name for f in fields if f.required]
    assert not any(f.required and str(f.field_type) == "timestamptz" for f in fields)
    redeclare(tmp_path, "type: timestamptz, pii", "type: timestamptz, required: true, pii")
    assert fields == reopen("back").open_for_write(RAW).schema().fields, "rows may hold NULL by then"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  - {name: value, type: string, pii: none, doc: payload}\n", "", "'value' that is no longer declared"),
        (
            "  - {name: value",
            "  - {name: must, type: string, required: true, pii: none, doc: m}\n  - {name: value",
            "'must' cannot be",
        ),
        ("transform: day", "transform: hour", "is partitioned by"),
    ],
)
def test_what_written_data_contradicts_is_refused(
    lake: Lake, reopen: Callable[[str], Lake], tmp_path: Path, old: str, new: str, says: str
) -> None:
    append(lake, 0, 0, 3)
    redeclare(tmp_path, old, new)
    with pytest.raises(Terminal, match=says):
        reopen("changed").open_for_write(RAW)


def test_a_snapshot_of_another_tool_is_within_no_cut(lake: Lake) -> None:
    append(lake, 0, 0, 5)
    append(lake, 0, 5, 9)
    lake.load(RAW).delete('"offset" = 8')
    table = lake.load(RAW)
    found = newest_within(table, RAW, {("events", 0): 5})
    assert found is None or found.sequence_number != table.metadata.last_sequence_number


def test_a_dropped_table_ends_the_job_at_once(lake: Lake) -> None:
    table = lake.open_for_write(RAW)
    lake.catalog.drop_table(RAW)
    change = append_change(lake, table, 0, 0, 3)
    with pytest.raises(Terminal, match="dropped"):
        commit(table, lake.run, change)
