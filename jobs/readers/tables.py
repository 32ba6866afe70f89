"""Parquet files, and what all formats made of Arrow batches share."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.readers.base import BadValue, FileSummary, Record
from jobs.readers.stream import hash_files, reading

# Rows in memory at a time; prompts of megabytes exist.
BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20


class ParquetReader:
    """One Parquet file. A row group is read piece by piece, as some writers make a single one."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self.name = name
        with reading(path), self._open() as file:
            self._schema = plain_schema(file.schema_arrow)
            self._group_rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    def schema(self) -> pa.Schema:
        """See `Reader.schema`."""
        return self._schema

    def summary(self) -> FileSummary:
        """See `Reader.summary`; the rows are counted in the file's footer."""
        return FileSummary(self.name, sum(self._group_rows), *hash_files([self._path]))

    def records(self, start: int) -> Iterator[Record]:
        """See `Reader.records`; row groups before `start` are not read."""
        group, first = 0, 0
        while group < len(self._group_rows) and first + self._group_rows[group] <= start:
            first += self._group_rows[group]
            group += 1
        groups = list(range(group, len(self._group_rows)))
        with reading(self._path), self._open() as file:
            batches = file.iter_batches(BATCH_ROWS, row_groups=groups, use_threads=False)
            yield from batch_records(self.name, _skip(batches, start - first), self._schema, start)

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self._path, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def batch_records(
    name: str, batches: Iterable[pa.RecordBatch | pa.Table], schema: pa.Schema, first_row: int
) -> Iterator[Record]:
    """Records of the rows of `batches`, numbered from `first_row`, with the types of a `plain_schema`."""
    row = first_row
    for batch in batches:
        for fields in _rows(batch if batch.schema.equals(schema) else batch.cast(schema)):
            yield Record(f"{name} row {row}", fields)
            row += 1


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """`schema` with the types that plain Python values convert to: no dictionaries, no extension types."""
    return pa.schema([(field.name, _plain_type(field.type)) for field in schema])


def _plain_type(found: pa.DataType) -> pa.DataType:
    if isinstance(found, pa.BaseExtensionType):
        return _plain_type(found.storage_type)
    if pa.types.is_dictionary(found):
        return _plain_type(found.value_type)
    if pa.types.is_list(found):
        return pa.list_(_plain_type(found.value_type))
    if pa.types.is_struct(found):
        return pa.struct([(field.name, _plain_type(field.type)) for field in found])
    return found


def _skip(batches: Iterable[pa.RecordBatch], count: int) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if count < batch.num_rows:
            yield batch.slice(count)
        count = max(0, count - batch.num_rows)


def _rows(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        columns = [(name, batch.column(name)) for name in batch.schema.names]
        rows = [{name: _value(column[i]) for name, column in columns} for i in range(batch.num_rows)]
    return rows


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return BadValue("invalid_unicode", "bytes that are not UTF-8; write the column as UTF-8")
