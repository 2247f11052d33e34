"""Scan a published table: the rendered Soda contract, run by Soda in DuckDB on the Iceberg table as it stands now."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lakehouse.checks import check_expressions
from lakehouse.lake import Lake
from lakehouse.queries import bind_table, connect
from lakehouse.render.soda import DATA_SOURCE, render_soda_contract


@dataclass(frozen=True)
class ScanReport:
    """What a scan found: how many checks passed, and (name, detail) of each that failed or could not be evaluated."""

    table: str
    passed: int
    failed: list[tuple[str, str]] = field(default_factory=list)


def scan(lake: Lake, name: str) -> ScanReport:
    """Hold every row of the table's current snapshot to its contract. Reads the whole table; sends nothing anywhere.

    Raises:
        UsageError: the table is not declared, or not created yet.
        DeclarationError: a check cannot be said in a contract.
    """
    declared, table = lake.declaration(name), lake.load(name)
    contract = render_soda_contract(declared)
    current = table.current_snapshot()
    # Soda reads this once, when it is imported, and would report to its maker
    os.environ["SODA_CORE_TELEMETRY_ENABLED"] = "false"
    with connect(lake.settings) as connection, _quiet():
        from soda_core.common.logs import preserve_active_logs
        from soda_core.common.yaml import ContractYamlSource
        from soda_core.contracts.contract_verification import ContractVerificationSession
        from soda_duckdb.common.data_sources.duckdb_data_source import DuckDBDataSourceImpl

        bind_table(connection, name, table, current.snapshot_id if current else None)
        with preserve_active_logs():
            session = ContractVerificationSession.execute(
                contract_yaml_sources=[ContractYamlSource.from_str(contract)],
                data_source_impls=[DuckDBDataSourceImpl.from_existing_cursor(connection, DATA_SOURCE)],
            )
    results = [r for c in session.contract_verification_results for r in c.check_results]
    error = _explain(session.get_errors()) if session.has_errors else ""
    failed = [(r.check.name, _detail(r, error)) for r in results if not r.is_passed]
    expected = len(check_expressions(declared)) + 1  # and row_count
    if not failed and (error or len(results) != expected):  # a contract that Soda reads only in part must not pass
        failed = [("contract", error or f"Soda ran {len(results)} of {expected} checks")]
    return ScanReport(name, sum(r.is_passed for r in results), failed)


def _detail(result: Any, error: str) -> str:
    """What one failed check found."""
    if not result.is_failed:  # Soda puts all checks in one query: if one is wrong, none is evaluated
        return f"not evaluated: {error or 'Soda gives no reason'}"
    return f"{int(result.threshold_value)} rows" + (" in the table" if result.check.type == "row_count" else "")


def _explain(errors: list[str]) -> str:
    """The first error, in one line; of an error met while reading data its kind alone, since it quotes the value."""
    first = errors[0] if errors else "unknown error"
    kind = re.search(r"\b(\w+ Error): [^\n]*", first)
    if kind is None:
        return first.splitlines()[0]
    return kind[0] if kind[1] in ("Binder Error", "Catalog Error", "Parser Error") else kind[1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Soda's log out of the process's log, and take back the root handler it installs (basicConfig would do nothing)."""
    root = logging.getLogger()
    soda = [h for h in root.handlers if _is_soda(h)]  # the host's own use of Soda, which collects the records
    others = [h for h in root.handlers if h not in soda]

    def not_soda(record: logging.LogRecord) -> bool:
        return record.name.partition(".")[0] not in ("soda", "soda_core")

    for handler in others:
        handler.addFilter(not_soda)
    try:
        yield
    finally:
        for handler in others:
            handler.removeFilter(not_soda)
        for handler in [h for h in root.handlers if _is_soda(h) and h not in soda]:
            root.removeHandler(handler)


def _is_soda(handler: logging.Handler) -> bool:
    return type(handler).__module__.startswith("soda_core.")
