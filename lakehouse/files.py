"""The files of a table in their store, a folder or S3: when they were modified, what is there, removing them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow.fs as pafs
from pyiceberg.io import FileIO
from pyiceberg.io.pyarrow import PyArrowFileIO

REMOVALS_AT_A_TIME = 16


def _filesystem(io: FileIO, location: str) -> tuple[pafs.FileSystem, str]:
    """The store that a location lies in, and its path there."""
    assert isinstance(io, PyArrowFileIO)
    scheme, netloc, path = io.parse_location(location, io.properties)
    return io.fs_by_scheme(scheme, netloc), path


def store_path(location: str) -> str:
    """A location as a listing shows it: without its scheme. `s3`, `s3a` and `s3n` are one store."""
    return re.sub(r"^[a-z0-9]+://", "", location)


def modified_ms(io: FileIO, location: str) -> int | None:
    """When a file was modified, by the store's clock, in ms since 1970; None if it is not there."""
    filesystem, path = _filesystem(io, location)
    found = filesystem.get_file_info(path)
    return found.mtime_ns // 1_000_000 if found.type == pafs.FileType.File else None


def list_files(io: FileIO, location: str) -> Iterator[tuple[str, int, int]]:
    """(store path, bytes, modified ms) of every file below a location; nothing if it does not exist. One folder at a time."""
    filesystem, path = _filesystem(io, location)
    folders = [path]
    while folders:
        for found in filesystem.get_file_info(pafs.FileSelector(folders.pop(), allow_not_found=True)):
            if found.type == pafs.FileType.Directory:
                folders.append(found.path)
            elif found.type == pafs.FileType.File:
                yield found.path, found.size, found.mtime_ns // 1_000_000


def remove_files(io: FileIO, locations: Sequence[str]) -> int:
    """Remove files; one that is not there is fine. Returns how many were there."""
    with ThreadPoolExecutor(REMOVALS_AT_A_TIME) as pool:
        return sum(pool.map(lambda location: _remove(io, location), locations))


def _remove(io: FileIO, location: str) -> bool:
    try:
        io.delete(location)
    except FileNotFoundError:
        return False
    return True
