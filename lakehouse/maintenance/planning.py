"""Which manifests and files a maintenance step must look at: those whose partitions can matter, and no others."""

from __future__ import annotations

from collections.abc import Iterator

from pyiceberg.expressions import BooleanExpression
from pyiceberg.expressions.visitors import inclusive_projection, manifest_evaluator
from pyiceberg.manifest import ManifestEntry
from pyiceberg.table import Table
from pyiceberg.transforms import TimeTransform


def entries_where(table: Table, where: BooleanExpression) -> Iterator[ManifestEntry]:
    """The live files of the current snapshot, with when they were added, from manifests that may hold rows of `where`.

    One manifest at a time is held in memory. Files that hold none of these rows are among them.
    """
    current = table.current_snapshot()
    if current is None:
        return
    schema, specs = table.schema(), table.specs()
    for manifest in current.manifests(table.io):
        spec = specs[manifest.partition_spec_id]
        if manifest_evaluator(spec, schema, inclusive_projection(schema, spec)(where))(manifest):
            yield from manifest.fetch_manifest_entry(table.io)


def time_partition(table: Table) -> tuple[int, str, str] | None:
    """(place in the partition, column, transform) of the first partition field that is a time; None if there is none."""
    for place, field in enumerate(table.spec().fields):
        if isinstance(field.transform, TimeTransform):
            return place, table.schema().find_field(field.source_id).name, str(field.transform)
    return None
