"""Part files: the output rows of one shard as one Parquet file that is either complete or absent.

Deliberately ignorant of commits: who may promote a part file is the driver's business.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

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

    Args:
        path: final, absolute path; nothing appears there before the file is complete and synced.
        schema: serialised pyarrow schema of the file.
    """

    def __init__(self, path: str, schema: bytes) -> None:
        self._path = Path(path)
        self._schema = pa.ipc.read_schema(pa.py_buffer(schema))
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
        table = pa.Table.from_pylist(self._records, schema=self._schema)
        partial = self._path.with_name(self._path.name + ".partial")
        try:
            pq.write_table(table, partial, compression="zstd")
            fsync(partial)
            part = _read_back(partial, len(self._records))
            partial.replace(self._path)
            fsync(self._path.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise JobError(
                f"cannot write part file {self._path}: {error}. Free space there, or check that the directory is"
                " writable on every node; the same command then resumes the job."
            ) from error
        return part


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


def _read_back(path: Path, rows: int) -> PartFile:
    # A full disk or a broken network mount may lose bytes without an error; the footer is written last.
    found = pq.read_metadata(path).num_rows
    if found != rows:
        raise OSError(f"{found} rows in the file after {rows} were written")
    return PartFile(rows=rows, bytes=path.stat().st_size, sha256=file_sha256(path))
