"""Part files: the output rows of one shard as one Parquet file that is either complete or absent.

In a directory by a temporary name, a sync and a rename; on an object store, where a put is whole or absent, at once.
Deliberately ignorant of commits: who may promote a part file is the driver's business.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from actors.object_store import ObjectStore, ObjectStoreError, is_uri, open_store, split
from actors.records import Record, stats_of
from actors.rows import ShardResult, ShardStats, ShardTask
from pipeline.digests import file_sha256
from pipeline.durable import fsync
from pipeline.errors import JobError


@dataclass(frozen=True, slots=True)
class PartFile:
    """What the commit record says about a part file."""

    rows: int
    bytes: int
    sha256: str


class PartWriter:
    """Collects the output rows of one shard, in any order, and writes them once.

    Attributes:
        schema: of the file.

    Args:
        path: final, absolute path or URI; nothing appears there before the file is complete and synced.
        schema: of the file, serialised.

    Raises:
        ConfigError: a URI that cannot be used from here.
    """

    def __init__(self, path: str, schema: bytes) -> None:
        self._path = path
        # Opened before the rows are generated: a node that cannot reach the store should say so early.
        self._store: ObjectStore | None = open_store(split(path)[0]) if is_uri(path) else None
        self.schema = pa.ipc.read_schema(pa.py_buffer(schema))
        self._records: list[Record] = []
        self._stats = ShardStats()

    @property
    def stats(self) -> ShardStats:
        """Counts over the rows added so far."""
        return self._stats

    def add(self, record: Record) -> None:
        """Take one output row, as made by `actors.records`."""
        self._records.append(record)
        self._stats += stats_of(record)

    def count(self, stats: ShardStats) -> None:
        """Adds counts that belong to the shard but to none of its rows."""
        self._stats += stats

    def close(self) -> PartFile:
        """Write, sync and read back the file, rows sorted by (row_index, sample).

        Raises:
            JobError: the file cannot be written; no half file stays behind.
        """
        self._records.sort(key=lambda record: (record["row_index"], record["sample"]))
        table = pa.Table.from_pylist(self._records, schema=self.schema)
        try:
            if self._store is not None:
                return _put(table, self._store, split(self._path)[1])
            return _write(table, Path(self._path))
        except ObjectStoreError as error:
            raise JobError(
                f"cannot write part file {self._path}: {error}. Check that every node may write there and has the"
                " same settings in its environment; the same command then resumes the job."
            ) from error
        except OSError as error:
            raise JobError(
                f"cannot write part file {self._path}: {error}. Free space there, or check that the directory is"
                " writable on every node; the same command then resumes the job."
            ) from error


def finish_shard(task: ShardTask, writer: PartWriter, seconds: float) -> ShardResult:
    """Close the writer and report the shard to the driver; raises JobError as `PartWriter.close` does."""
    part = writer.close()
    return ShardResult(
        shard=task.shard,
        attempt=task.attempt,
        path=task.part_path,
        rows=part.rows,
        bytes=part.bytes,
        sha256=part.sha256,
        stats=writer.stats,
        seconds=seconds,
    )


def _write(table: pa.Table, path: Path) -> PartFile:
    partial = path.with_name(path.name + ".partial")
    try:
        pq.write_table(table, partial, compression="zstd")
        fsync(partial)
        part = _read_back(partial, table.num_rows)
        partial.replace(path)
        fsync(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return part


def _read_back(path: Path, rows: int) -> PartFile:
    # A full disk or a broken network mount may lose bytes without an error; the footer is written last.
    found = pq.read_metadata(path).num_rows
    if found != rows:
        raise OSError(f"{found} rows in the file after {rows} were written")
    return PartFile(rows=rows, bytes=path.stat().st_size, sha256=file_sha256(path))


def _put(table: pa.Table, store: ObjectStore, key: str) -> PartFile:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue()
    # Never over another object: a key belongs to one attempt of one run of a driver.
    if store.create(key, data) is None:
        raise ObjectStoreError(f"{store.uri}/{key} is there already, with another content")
    found = store.read(key)
    if found is None or found.data != data:
        raise ObjectStoreError(f"{store.uri}/{key} does not come back as it was written")
    return PartFile(rows=table.num_rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
