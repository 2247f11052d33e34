"""Snowflake DDL from the declarations: the same Iceberg tables over Glue, documented, tagged and masked.

The columns of an externally managed table come from its Iceberg metadata, so they are not listed; their docs and PII
classes are. Syntax: docs.snowflake.com, `create-iceberg-table-aws-glue`, `create-catalog-integration-glue`,
`create-external-volume`, `alter-iceberg-table`, `tag-based-masking-policies`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from lakehouse.declarations import Column, Declaration, Pii
from lakehouse.errors import DeclarationError

VOLUME, INTEGRATION = "STREAMFORGE_LAKE", "STREAMFORGE_GLUE"
TAG, POLICY = "GOVERNANCE.PII", "GOVERNANCE.PII"

ROLES: dict[Pii, str] = {"personal": "PII_PERSONAL", "restricted": "PII_RESTRICTED"}
"""The role that reads a masked class in clear; the classes that are absent are not masked."""

# A masking policy is bound to one Snowflake type, which the column must have. Decimals (a policy has one scale) and nested
# types are left out: no policy would match them, and their columns would be readable by everyone.
MASKABLE = {
    "string": "VARCHAR",
    "binary": "BINARY",
    "boolean": "BOOLEAN",
    "int": "NUMBER",
    "long": "NUMBER",
    "float": "FLOAT",
    "double": "FLOAT",
    "date": "DATE",
    "time": "TIME",
    "timestamp": "TIMESTAMP_NTZ",
    "timestamptz": "TIMESTAMP_LTZ",
}


def render_snowflake(
    declarations: Mapping[str, Declaration],
    *,
    region: str = "<AWS_REGION>",
    account_id: str = "<AWS_ACCOUNT_ID>",
    role_arn: str = "<SNOWFLAKE_ROLE_ARN>",
    bucket: str = "<BUCKET>",
    database: str = "STREAMFORGE",
) -> str:
    """One script, safe to run again: prerequisites, PII tag and masking policies, then every table with its docs and tags.

    region, account_id: of the Glue Data Catalog; role_arn: the IAM role Snowflake assumes, for Glue and for the bucket;
    bucket: of the warehouse. What is not given stays a `<PLACEHOLDER>`.

    Raises:
        DeclarationError: a personal or restricted column has a type that no masking policy can protect.
    """
    statements = [
        *_prerequisites(declarations, region, account_id, role_arn, bucket, database),
        *_governance(declarations, database),
        *(s for d in declarations.values() for s in _table(d, database)),
    ]
    return f"{HEADER}\n" + "".join(f"{s};\n" for s in statements)


HEADER = f"""\
-- Rendered by the lakehouse from catalog/; change the declaration, not this file. Safe to run again.
--
-- Before: an IAM role that Snowflake may assume, with read access to the bucket and to Glue. After the first run, take the
-- principals and external ids of `DESC EXTERNAL VOLUME {VOLUME}` and `DESC CATALOG INTEGRATION
-- {INTEGRATION}` into its trust policy.
--
-- Roles (create them and grant them to people elsewhere; nothing here grants anything):
--   {ROLES["personal"]:<15} reads columns of class `personal` in clear
--   {ROLES["restricted"]:<15} reads columns of class `restricted` in clear
--   any other role  reads NULL there. `pseudonymous` columns are tagged, not masked: joins need them.
-- The two do not include each other. A column that becomes `none` keeps its old tag until someone unsets it.
-- Until a table's tags are set its owner alone can read it: grant after this script.
"""


def _literal(text: str) -> str:
    # Snowflake reads backslash escapes in '...'
    return "'" + " ".join(text.split()).replace("\\", "\\\\").replace("'", "''") + "'"


def _column(name: str) -> str:
    """A column as Snowflake resolves the plain name, but never taken for a keyword (`offset`, `partition`, `key`)."""
    return f'"{name.upper()}"'


def _prerequisites(
    declarations: Mapping[str, Declaration], region: str, account_id: str, role_arn: str, bucket: str, database: str
) -> Iterator[str]:
    yield (
        f"CREATE EXTERNAL VOLUME IF NOT EXISTS {VOLUME}\n"
        f"  STORAGE_LOCATIONS = ((NAME = 'lake' STORAGE_PROVIDER = 'S3'\n"
        f"    STORAGE_BASE_URL = {_literal(f's3://{bucket}/')} STORAGE_AWS_ROLE_ARN = {_literal(role_arn)}))\n"
        "  ALLOW_WRITES = FALSE"
    )
    yield (
        f"CREATE CATALOG INTEGRATION IF NOT EXISTS {INTEGRATION}\n"
        "  CATALOG_SOURCE = GLUE\n"
        "  TABLE_FORMAT = ICEBERG\n"
        f"  GLUE_AWS_ROLE_ARN = {_literal(role_arn)}\n"
        f"  GLUE_CATALOG_ID = {_literal(account_id)}\n"
        f"  GLUE_REGION = {_literal(region)}\n"
        "  ENABLED = TRUE\n"
        "  REFRESH_INTERVAL_SECONDS = 30"
    )
    yield f"CREATE DATABASE IF NOT EXISTS {database}"
    for schema in dict.fromkeys(["governance", *(d.layer for d in declarations.values())]):
        yield f"CREATE SCHEMA IF NOT EXISTS {database}.{schema.upper()}"


def _governance(declarations: Mapping[str, Declaration], database: str) -> Iterator[str]:
    """The tag and one masking policy a type; a tag takes one policy for each type, so the policy reads the class."""
    tag = f"{database}.{TAG}"
    yield f"CREATE TAG IF NOT EXISTS {tag} ALLOWED_VALUES {', '.join(_literal(v) for v in get_args(Pii))}"
    clear = ", ".join(_literal(v) for v in get_args(Pii) if v not in ROLES)
    seen = f"SYSTEM$GET_TAG_ON_CURRENT_COLUMN({_literal(tag)})"
    branches = [f"{seen} IN ({clear})"]
    branches += [f"{seen} = {_literal(pii)} AND IS_ROLE_IN_SESSION({_literal(role)})" for pii, role in ROLES.items()]
    # what no branch allows is NULL: a class that the policy does not know, too
    body = "CASE\n" + "".join(f"    WHEN {branch} THEN val\n" for branch in branches) + "    ELSE NULL\n  END"
    types = sorted({_mask_type(d, c) for d in declarations.values() for c in d.columns if c.pii in ROLES})
    for kind in types:
        policy = f"{database}.{POLICY}_{kind}"
        yield f"CREATE MASKING POLICY IF NOT EXISTS {policy} AS (val {kind}) RETURNS {kind} ->\n  {body}"
        # a policy in use cannot be replaced; its body can
        yield f"ALTER MASKING POLICY {policy} SET BODY ->\n  {body}"
    if types:
        policies = ", ".join(f"MASKING POLICY {database}.{POLICY}_{kind}" for kind in types)
        yield f"ALTER TAG {tag} SET {policies} FORCE"


def _mask_type(declared: Declaration, column: Column) -> str:
    if isinstance(column.type, str) and column.type in MASKABLE:
        return MASKABLE[column.type]
    raise DeclarationError(
        f"{declared.path}: column {column.name!r} is {column.pii}, but no Snowflake masking policy fits its type "
        f"{column.type!r}; use one of {', '.join(MASKABLE)}"
    )


def _table(declared: Declaration, database: str) -> Iterator[str]:
    table = f"{database}.{declared.layer.upper()}.{declared.name.upper()}"
    yield (
        f"CREATE ICEBERG TABLE IF NOT EXISTS {table}\n"
        f"  EXTERNAL_VOLUME = '{VOLUME}'\n"
        f"  CATALOG = '{INTEGRATION}'\n"
        f"  CATALOG_TABLE_NAME = {_literal(declared.name)}\n"
        f"  CATALOG_NAMESPACE = {_literal(declared.layer)}\n"
        "  AUTO_REFRESH = TRUE"
    )
    for column in declared.columns:  # tags before docs: the sooner a column is masked, the better
        if column.pii != "none":
            tag = f"{database}.{TAG} = {_literal(column.pii)}"
            yield f"ALTER ICEBERG TABLE {table} MODIFY COLUMN {_column(column.name)} SET TAG {tag}"
    yield f"COMMENT ON TABLE {table} IS {_literal(f'{declared.doc} Grain: {declared.grain}. Owner: {declared.owner}.')}"
    for column in declared.columns:
        yield f"COMMENT ON COLUMN {table}.{_column(column.name)} IS {_literal(column.doc)}"
