"""Whether a table holds exactly what was produced: written without the code it judges, neither the writer's nor pyiceberg's.

It is given the producer's own log (what the broker's delivery reports acknowledged, `LOG_SCHEMA`) and where the table's
metadata lies, and goes from there by itself: metadata JSON, manifest list and manifests (Avro, read by DuckDB), Parquet files
(pyarrow). Every offset of every partition must be there once, its key, headers and payload equal byte for byte.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

LOG_SCHEMA = pa.schema(
    [
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("key", pa.binary()),
        ("headers", pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))),
        ("payload", pa.binary()),
    ]
)
LIVE = (0, 1)  # status of a manifest entry: existing, added; 2 is deleted

Coordinate = tuple[str, int, int]


@dataclass
class Verdict:
    """What differs, by coordinates; `rows` and `files` say how much was looked at."""

    rows: int = 0
    files: int = 0
    lost: list[Coordinate] = field(default_factory=list)
    doubled: list[Coordinate] = field(default_factory=list)
    unexpected: list[Coordinate] = field(default_factory=list)  # never acknowledged to the producer
    changed: list[tuple[Coordinate, str]] = field(default_factory=list)  # and which of key, headers, payload
    broken: list[str] = field(default_factory=list)  # files that do not hold what their manifest says

    @property
    def clean(self) -> bool:
        """Whether table and log agree."""
        return not (self.lost or self.doubled or self.unexpected or self.changed or self.broken)

    def summary(self) -> dict[str, Any]:
        """Counts, with the first few of each kind."""
        kinds = ("lost", "doubled", "unexpected", "changed", "broken")
        found = {k: getattr(self, k) for k in kinds}
        return (
            {"rows": self.rows, "files": self.files}
            | {k: len(v) for k, v in found.items()}
            | {"first": {k: v[:5] for k, v in found.items() if v}}
        )


def verify(log: pa.Table, metadata_location: str, s3: fs.FileSystem | None = None) -> Verdict:
    """Compare the current snapshot of a table with the producer's log.

    log: LOG_SCHEMA, any order. s3: how s3:// paths are read.
    """
    verdict = Verdict()
    held: dict[Coordinate, tuple[Any, ...]] = {}
    for rows in _live_rows(metadata_location, s3, verdict):
        for at, *what in _records(rows):
            verdict.rows += 1
            if at in held:
                verdict.doubled.append(at)
            held[at] = (*held[at], *what) if at in held else tuple(what)
    sent = {at: tuple(what) for at, *what in _records(log)}
    assert len(sent) == log.num_rows, "the log itself names a coordinate twice"
    verdict.doubled.sort()
    verdict.lost = sorted(sent.keys() - held.keys())
    verdict.unexpected = sorted(held.keys() - sent.keys())
    for at in sorted(sent.keys() & held.keys()):
        copies = [held[at][i : i + 3] for i in range(0, len(held[at]), 3)]
        for i, name in enumerate(("key", "headers", "payload")):
            if any(copy[i] != sent[at][i] for copy in copies):
                verdict.changed.append((at, name))
    return verdict


def _records(rows: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Each row as (coordinate, key, headers, payload); headers as ordered pairs, for a name may come twice."""
    columns = [rows.column(name).to_pylist() for name in LOG_SCHEMA.names]
    for topic, partition, offset, key, headers, payload in zip(*columns, strict=True):
        yield (topic, partition, offset), key, tuple((h["key"], h["value"]) for h in headers or ()), payload


def _live_rows(metadata_location: str, s3: fs.FileSystem | None, verdict: Verdict) -> Iterator[pa.Table]:
    """The rows of each live data file of the current snapshot; a file that is listed twice comes twice."""
    metadata = json.loads(_bytes(metadata_location, s3))
    current = metadata.get("current-snapshot-id")
    if current in (None, -1):
        return
    (snapshot,) = [s for s in metadata["snapshots"] if s["snapshot-id"] == current]
    for manifest in _avro(snapshot["manifest-list"], s3):
        if manifest["content"] != 0:
            raise ValueError(f"{manifest['manifest_path']} lists delete files, which an append-only table does not have")
        for entry in _avro(manifest["manifest_path"], s3):
            if entry["status"] not in LIVE:
                continue
            file = entry["data_file"]
            rows = pq.read_table(pa.BufferReader(_bytes(file["file_path"], s3)), columns=LOG_SCHEMA.names)
            verdict.files += 1
            if rows.num_rows != file["record_count"]:
                verdict.broken.append(f"{file['file_path']}: {rows.num_rows} rows, its manifest says {file['record_count']}")
            yield rows


def _bytes(location: str, s3: fs.FileSystem | None) -> bytes:
    """A file's content; locations are file:///path or s3://bucket/key."""
    url = urlparse(location)
    if url.scheme == "s3":
        assert s3 is not None, f"{location} is in an object store, and no way to read it was given"
        with s3.open_input_file(f"{url.netloc}{url.path}") as file:
            return bytes(file.read())
    return Path(url.path).read_bytes()


def _avro(location: str, s3: fs.FileSystem | None) -> list[dict[str, Any]]:
    """The records of an Avro file."""
    with tempfile.NamedTemporaryFile(suffix=".avro") as local:
        local.write(_bytes(location, s3))
        local.flush()
        return _engine().execute("SELECT * FROM read_avro(?)", [local.name]).to_arrow_table().to_pylist()


def _engine() -> duckdb.DuckDBPyConnection:
    """A DuckDB that can read Avro, by the extension from its wheel."""
    global _connection
    if _connection is None:
        folder = Path(str(importlib.import_module("duckdb_extension_avro").__file__)).parent / "extensions"
        (extension,) = (folder / f"v{duckdb.__version__}").glob("*.duckdb_extension")
        _connection = duckdb.connect()
        _connection.execute(f"LOAD '{extension}'")
    return _connection


_connection: duckdb.DuckDBPyConnection | None = None
