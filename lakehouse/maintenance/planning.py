"""Which manifests and files a maintenance step must look at: those whose partitions can matter, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pyiceberg.expressions import BooleanExpression
from pyiceberg.expressions.visitors import inclusive_projection, manifest_evaluator
from pyiceberg.manifest import ManifestContent
from pyiceberg.table import Table
from pyiceberg.transforms import TimeTransform
from pyiceberg.types import DateType, IcebergType, TimestampType

from lakehouse.live import LiveFile, position_deletes


def files_listed(table: Table, where: BooleanExpression) -> Iterator[LiveFile]:
    """The live data files of the current snapshot that manifests list which may hold rows of `where`.

    One manifest at a time is held in memory. Files that hold none of these rows are among them.
    """
    current = table.current_snapshot()
    if current is None:
        return
    schema, specs, deletes = table.schema(), table.specs(), position_deletes(table, current)
    for manifest in current.manifests(table.io):
        spec = specs[manifest.partition_spec_id]
        concerned = manifest_evaluator(spec, schema, inclusive_projection(schema, spec)(where))(manifest)
        if manifest.content == ManifestContent.DATA and concerned:
            for entry in manifest.fetch_manifest_entry(table.io):
                yield LiveFile.of(entry, deletes.get(entry.data_file.file_path, ()))


@dataclass(frozen=True)
class TimePartition:
    """A partition field that is a time: its place in the partition, its column and the column's type, its transform."""

    place: int
    column: str
    type: IcebergType
    transform: str

    def value(self, at: datetime) -> Any:
        """A time (with zone) as the column holds it; of a day, the day."""
        if isinstance(self.type, DateType):
            return at.date().isoformat()
        return at.replace(tzinfo=None) if isinstance(self.type, TimestampType) else at


def time_partition(table: Table) -> TimePartition | None:
    """The first partition field that is a time; None if there is none."""
    for place, field in enumerate(table.spec().fields):
        if isinstance(field.transform, TimeTransform):
            source = table.schema().find_field(field.source_id)
            return TimePartition(place, source.name, source.field_type, str(field.transform))
    return None
