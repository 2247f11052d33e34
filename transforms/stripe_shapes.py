"""SQL that normalises a Stripe object, made from catalog/reference/stripe_objects.yaml: what it says is read there.

Every API version's shape goes through the same paths, and so do the values before a change (`data.previous_attributes`), so
that versions rendered at different API versions can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lakehouse.queries import epoch_time

Columns: TypeAlias = Mapping[str, Sequence[str]]
"""{column: [type, path, path, ...]}."""

SQL_TYPES = {
    "text": "CAST({} ->> '$' AS VARCHAR)",
    "long": "TRY_CAST({} ->> '$' AS BIGINT)",
    "bool": "TRY_CAST({} ->> '$' AS BOOLEAN)",
    "time": epoch_time("{0} ->> '$'"),
    "json": "nullif(CAST({} AS VARCHAR), 'null')",
}
"""How a normalised JSON value (SQL NULL: not carried; JSON null: NULL) becomes a typed one."""

NEVER_EXTRA = ("id", "object", "livemode", "deleted")


def typed_sql(value: str, kind: str, name: str) -> str:
    """A normalised JSON value as a typed column `name`."""
    return f'{SQL_TYPES[kind].format(value)} AS "{name}"'


def object_types(reference: Mapping[str, Any]) -> dict[str, str]:
    """{type as Stripe names it: the type it is kept as}: `plan` is the older name of `price`."""
    return {name: spec if isinstance(spec, str) else name for name, spec in reference.items()}


def shapes(reference: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The object types that are kept, each with `columns`, `lists` and `known`."""
    return {name: spec for name, spec in reference.items() if not isinstance(spec, str)}


def parents(path: str) -> list[str]:
    """`a.b[0].c` -> [`a`, `a.b[0]`]: the objects that a path goes through."""
    steps = path.split(".")
    return [".".join(steps[:n]) for n in range(1, len(steps))]


def paths_of(columns: Columns) -> list[str]:
    """Every path that the columns are read from, and those of the objects above them."""
    found = {path for _, *paths in columns.values() for path in paths}
    return sorted(found | {p for path in found for p in parents(path)})


def object_sql(columns: Columns, values: str, prefix: str = "$.") -> tuple[str, str]:
    """(the list of paths to extract, as SQL; the normalised object as JSON text, made of the list `values` so extracted).

    A column is the first of its paths that is carried; one that is not carried does not appear. A path whose parent is an
    explicit null is null too (`address: null` says that there is no country).
    """
    paths = paths_of(columns)
    place = {path: f"{values}[{i}]" for i, path in enumerate(paths, start=1)}
    entries = []
    for name, (_, *candidates) in columns.items():
        above = dict.fromkeys(p for path in candidates for p in parents(path))
        options = [place[p] for p in candidates]
        options += [f"CASE WHEN CAST({place[p]} AS VARCHAR) = 'null' THEN 'null'::JSON END" for p in above]
        # concat_ws leaves NULLs out: a column that is not carried does not appear
        entries.append(f"'\"{name}\":' || coalesce({', '.join(options)}, NULL)")
    listed = ", ".join(f"'{prefix}{p}'" for p in paths)
    return f"[{listed}]", "'{' || concat_ws(',', " + ", ".join(entries) + ") || '}'"


def list_sql(name: str, spec: Mapping[str, Any], body: str) -> str:
    """One entry `"name":[{...}, ...]` of the normalised object, for a list nested in it; NULL if it is not carried."""
    paths, item = object_sql(spec["columns"], "f")
    at = f"$.data.object.{spec['at']}"
    items = (
        f"list_transform(list_transform(json_extract({body}, '{at}[*]'), lambda x: json_extract(x, {paths})), lambda f: {item})"
    )
    return f"CASE WHEN json_type({body}, '{at}') = 'ARRAY' THEN '\"{name}\":[' || array_to_string({items}, ',') || ']' END"


def extra_sql(spec: Mapping[str, Any], body: str) -> str:
    """The top-level fields that no column is read from and that are not known, as a JSON object; NULL if there are none."""
    used = {p.partition(".")[0].partition("[")[0] for p in paths_of(spec["columns"])}
    used |= {nested["at"].partition(".")[0] for nested in spec.get("lists", {}).values()}
    used |= {at.partition(".")[0] for at in spec.get("nested", {}).values()}
    known = ", ".join(f"'{k}'" for k in sorted({*used, *spec.get("known", ()), *NEVER_EXTRA}))
    unknown = f"list_filter(json_keys({body}, '$.data.object'), lambda k: k NOT IN ({known}))"
    pointer = "'/data/object/' || replace(replace(k, '~', '~0'), '/', '~1')"
    value = f"CAST(json_extract({body}, {pointer}) AS VARCHAR)"
    entries = f"list_transform({unknown}, lambda k: CAST(to_json(k) AS VARCHAR) || ':' || {value})"
    return f"CASE WHEN len({unknown}) > 0 THEN '{{' || array_to_string({entries}, ',') || '}}' END"


PER_TYPE = """
SELECT
    * EXCLUDE (body, whole, found, before),
    -- customer.subscription.deleted is a change to canceled, not the end of the object's history
    event_type LIKE '%.deleted' AND object_type <> 'subscription' AND NOT nested AS deleted,
    CASE WHEN nested THEN 1 WHEN event_type LIKE '%.created' THEN 0 WHEN event_type LIKE '%.deleted' THEN 2 ELSE 1 END AS rank,
    {state} AS state,
    CASE WHEN said THEN {previous} END AS previous,
    {extra} AS extra
FROM (
    SELECT
        *,
        json_extract(body, {object_paths}) AS found,
        CASE WHEN said THEN json_extract(body, {previous_paths}) END AS before
    FROM (SELECT *, json_type(body, '$.data.previous_attributes') = 'OBJECT' AS said FROM parsed)
    WHERE object_type = '{object_type}' AND reason IS NULL
)
"""


def nested_sql(reference: Mapping[str, Any]) -> str:
    """SELECT of the objects of ours that lie whole inside others, from `chosen`: one row each, with `whole`, `nested_type`."""
    selects = []
    for outer, spec in shapes(reference).items():
        for inner, at in spec.get("nested", {}).items():
            path = f"$.data.object.{at}"
            objects = (
                f"CASE json_type(whole, '{path}') WHEN 'ARRAY' THEN json_extract(whole, '{path}[*]') "
                f"WHEN 'OBJECT' THEN [json_extract(whole, '{path}')] ELSE [] END"
            )
            selects.append(
                f"SELECT *, '{inner}' AS nested_type, unnest({objects}) AS inner_object FROM chosen WHERE f[7] = '{outer}'"
            )
    return " UNION ALL ".join(selects)


def normalise_sql(object_type: str, spec: Mapping[str, Any]) -> str:
    """SELECT that adds `deleted`, `rank`, `state`, `previous`, `extra` to the rows of `parsed` that have this object type."""
    object_paths, state = object_sql(spec["columns"], "found", "$.data.object.")
    previous_paths, previous = object_sql(spec["columns"], "before", "$.data.previous_attributes.")
    if lists := [list_sql(name, nested, "whole") for name, nested in spec.get("lists", {}).items()]:
        body = state.removeprefix("'{' || concat_ws(',', ").removesuffix(") || '}'")
        state = "'{' || concat_ws(',', " + ", ".join([body, *lists]) + ") || '}'"
    return PER_TYPE.format(
        object_type=object_type,
        state=state,
        previous=previous,
        extra=extra_sql(spec, "whole"),
        object_paths=object_paths,
        previous_paths=previous_paths,
    )
