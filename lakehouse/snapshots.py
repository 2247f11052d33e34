"""How pyiceberg builds a snapshot for us: what it copies, and which manifests it writes.

A writer waits for its commit, so a commit must cost what the batch costs. Reading and writing one entry of a manifest takes
pyiceberg 0.1 ms: a commit merges small manifests alone, and maintenance makes large ones of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyiceberg.exceptions import ValidationException
from pyiceberg.manifest import (
    DataFileContent,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestFile,
    ManifestWriterV2,
)
from pyiceberg.table import Transaction
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.update.snapshot import _MergeAppendFiles, _OverwriteFiles
from pyiceberg.typedef import Record

SMALL_MANIFEST_FILES = 200
"""A commit merges manifests of fewer files than this."""


class OneSnapshot(Transaction):
    """A transaction that stages one snapshot, and reads the table's metadata until then instead of copying it.

    pyiceberg's own applies what is staged to a deep copy each time it is asked, 14 times a commit, though nothing is staged
    yet: at 300 snapshots that is 80 % of a commit.
    """

    @property
    def table_metadata(self) -> TableMetadata:
        """The metadata with what is staged applied."""
        return super().table_metadata if self._updates else self._table.metadata


class Append(_MergeAppendFiles):
    """An append that merges only small manifests, so that no commit pays for the size of the table."""

    def _process_manifests(self, manifests: list[ManifestFile]) -> list[ManifestFile]:
        small = [m for m in manifests if _holds_data(m) and files_in(m) < SMALL_MANIFEST_FILES]
        chosen = {m.manifest_path for m in small}
        return super()._process_manifests(small) + [m for m in manifests if m.manifest_path not in chosen]


class _DeleteManifest(ManifestWriterV2):
    """A manifest of delete files, which pyiceberg reads and does not write."""

    def content(self) -> ManifestContent:
        return ManifestContent.DELETES

    @property
    def _meta(self) -> dict[str, str]:
        return {**super()._meta, "content": "deletes"}


class Overwrite(_OverwriteFiles, Append):
    """An overwrite that merges manifests as an append does, and adds and removes position delete files too.

    pyiceberg's own never merges, and carries manifests of removed files along for ever: after 60 rewrites a commit reads 61
    manifests and takes 280 ms instead of 80.
    """

    def _existing_manifests(self) -> list[ManifestFile]:
        return [m for m in super()._existing_manifests() if m.has_added_files() or m.has_existing_files()]

    def _manifests(self) -> list[ManifestFile]:
        """Delete files lie in manifests of their own, which are written anew if any comes or goes: there are few."""
        added, removed = self._added_data_files, self._deleted_data_files
        try:
            self._added_data_files = [f for f in added if f.content == DataFileContent.DATA]
            self._deleted_data_files = {f for f in removed if f.content == DataFileContent.DATA}
            manifests = super()._manifests()
        finally:
            self._added_data_files, self._deleted_data_files = added, removed
        come, go = ({f for f in files if f.content != DataFileContent.DATA} for files in (added, removed))
        if not come and not go:
            return manifests
        present = [entry for m in manifests if not _holds_data(m) for entry in self.fetch_manifest_entry(m)]
        if missing := go - {entry.data_file for entry in present}:
            raise ValidationException(f"Missing required files to delete: {', '.join(sorted(f.file_path for f in missing))}")
        written = [m for m in manifests if _holds_data(m)]
        for spec in sorted({entry.data_file.spec_id for entry in present} | {file.spec_id for file in come}):
            output = self.new_manifest_output()
            with _DeleteManifest(self.spec(spec), self.schema(), output, self.snapshot_id, self._compression) as writer:
                for entry in (e for e in present if e.data_file.spec_id == spec):
                    (writer.delete if entry.data_file in go else writer.existing)(entry)
                for file in (f for f in added if f in come and f.spec_id == spec):
                    writer.add(ManifestEntry.from_args(status=ManifestEntryStatus.ADDED, data_file=file))
            written.append(writer.to_manifest_file())
        return written


def _holds_data(manifest: ManifestFile) -> bool:
    return bool(manifest.content == ManifestContent.DATA)


class Cluster(_MergeAppendFiles):
    """A snapshot of the same files, in which the manifests that are too small are written anew, ordered by partition."""

    def _process_manifests(self, manifests: list[ManifestFile]) -> list[ManifestFile]:
        small = {m.manifest_path for m in undersized(manifests, self._target_size_bytes)}
        written = [m for m in manifests if m.manifest_path not in small]
        for spec in sorted({m.partition_spec_id for m in manifests if m.manifest_path in small}):
            chosen = (m for m in manifests if m.manifest_path in small and m.partition_spec_id == spec)
            written += self._write(spec, (e for m in chosen for e in self.fetch_manifest_entry(m)))
        return written

    def _write(self, spec: int, entries: Iterable[ManifestEntry]) -> list[ManifestFile]:
        """Manifests of up to the target size that hold the entries, neighbours in partition beside each other."""
        written: list[ManifestFile] = []
        left = sorted(entries, key=lambda e: _ordered(e.data_file.partition), reverse=True)
        while left:
            with self.new_manifest_writer(self.spec(spec)) as writer:
                while left and writer.tell() < self._target_size_bytes:
                    writer.existing(left.pop())
            written.append(writer.to_manifest_file())
        return written


def _ordered(partition: Record) -> list[tuple[bool, Any]]:
    """A partition as a sort key; NULL comes first."""
    return [(value is not None, value) for value in (partition[i] for i in range(len(partition)))]


def files_in(manifest: ManifestFile) -> int:
    """How many live files a manifest lists."""
    return (manifest.added_files_count or 0) + (manifest.existing_files_count or 0)


def undersized(manifests: Iterable[ManifestFile], target_bytes: int) -> list[ManifestFile]:
    """The manifests of data files of less than half the target size."""
    return [m for m in manifests if _holds_data(m) and m.manifest_length < target_bytes // 2]
