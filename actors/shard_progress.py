"""The finished rows of a shard that is not committed yet, kept where they outlive whoever generated them.

    OUTPUT/_progress/SHARD/ATTEMPT              a file that only grows, synced every few seconds
    URI/_progress/SHARD/ATTEMPT-RUN-NUMBER      on an object store, where nothing grows: another object each time

Both hold frames: size and digest of a payload, then the payload, some rows as an Arrow stream. The digest has the job's
fingerprint for a key, so that a torn tail, a flipped bit, and a frame by a job of other options that once had this
output are one thing: no frame. There the reading of a file ends. Only what was generated is kept; what
was read is in the inputs. Rows that failed are not: they cost little, or ought to be tried again.

Nothing here ever fails a shard: what cannot be written or read is generated again.
"""

import hashlib
import json
import logging
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from actors.object_store import ObjectStore, is_uri, open_store
from actors.records import Record, generated_schema
from actors.rows import ProgressPlace
from pipeline.durable import fsync

PROGRESS = "_progress"
FILE_SECONDS = 2.0
OBJECT_SECONDS = 10.0  # each is a request, to be paid for
# Rest this many times as long as the last write took: keeping rows then costs at most 1% of a shard's time.
REST = 99.0

_VERSION = 1
_HEAD = struct.Struct("<Q16s")
_COMPRESSED = pa.ipc.IpcWriteOptions(compression="zstd")  # with --retry-errors it may be a second copy of all output

Key = tuple[int, int]  # row_index, sample

log = logging.getLogger(__name__)


def progress_key(fingerprint: Mapping[str, Any]) -> bytes:
    """What the progress of a job is told by from that of another."""
    text = json.dumps({"version": _VERSION, **fingerprint}, sort_keys=True)
    return hashlib.sha256(text.encode()).digest()


def frame(payload: bytes, key: bytes) -> bytes:
    """A payload as it is written."""
    return _HEAD.pack(len(payload), _digest(payload, key)) + payload


def payloads(data: bytes, key: bytes) -> Iterator[bytes]:
    """The payloads of all frames up to the first that is none of this key."""
    at = 0
    while len(data) - at >= _HEAD.size:
        size, digest = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        payload = data[at : at + size]
        if len(payload) < size or _digest(payload, key) != digest:
            return
        yield payload
        at += size


class ShardProgress:
    """Progress of one attempt at a shard, and what earlier ones left.

    Attributes:
        is_there: whether the shard has any, of whatever attempt and content.

    Args:
        place: of this attempt; None keeps nothing.
        schema: of the part file.
    """

    def __init__(self, place: ProgressPlace | None, schema: pa.Schema) -> None:
        self.is_there = False
        self._place = place
        self._schema = generated_schema(schema)
        self._medium: _Medium | None = None
        if place is not None:
            self._medium = _Objects(place.path) if is_uri(place.path) else _Files(Path(place.path))
        self._unsaved: list[Record] = []
        self._due = time.monotonic() + (self._medium.seconds if self._medium else 0.0)

    def read(self) -> dict[Key, Record]:
        """What was generated of the rows that are safe, without the input's columns."""
        if self._medium is None or self._place is None:
            return {}
        rows: dict[Key, Record] = {}
        try:
            for data in self._medium.contents():
                self.is_there = True
                for payload in payloads(data, self._place.key):
                    rows |= {(row["row_index"], row["sample"]): row for row in self._rows(payload)}
        except OSError as error:
            log.warning("progress of %s cannot be read, the rest is generated again: %s", self._place.path, error)
        return rows

    def add(self, record: Record) -> None:
        """Take a finished row, and write those that wait if it is time to."""
        if self._medium is not None:
            self._unsaved.append(record)
            self.save_if_due()

    def seconds_left(self) -> float | None:
        """Until `save_if_due` has something to do; None if it has not."""
        return max(0.0, self._due - time.monotonic()) if self._unsaved else None

    def save_if_due(self) -> None:
        """Write the rows that wait, if it is time to; never raises."""
        if not self._unsaved or time.monotonic() < self._due:
            return
        assert self._medium is not None and self._place is not None  # else `add` takes nothing
        begin = time.monotonic()
        try:
            self.save(self._unsaved)
        except OSError as error:
            log.warning("rows of %s are not kept from now on, a crash costs them: %s", self._place.path, error)
            self._medium, self._unsaved = None, []
            return
        self._unsaved = []
        end = time.monotonic()
        self._due = end + max(self._medium.seconds, REST * (end - begin))

    def save(self, records: list[Record]) -> None:
        """Write rows at once, synced; raises OSError."""
        assert self._medium is not None and self._place is not None
        self.is_there = True
        batch = pa.RecordBatch.from_pylist(records, schema=self._schema)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._schema, options=_COMPRESSED) as stream:
            stream.write_batch(batch)
        self._medium.append(frame(sink.getvalue().to_pybytes(), self._place.key))

    def _rows(self, payload: bytes) -> list[Record]:
        table = pa.ipc.open_stream(payload).read_all()
        rows: list[Record] = table.to_pylist()
        return rows


class _Medium(Protocol):
    """Where progress is written.

    Attributes:
        seconds: between two writes, at least.
    """

    seconds: float

    def contents(self) -> Iterator[bytes]:
        """Of all files or objects of the shard; raises OSError."""

    def append(self, data: bytes) -> None:
        """Add to this attempt's; raises OSError."""


class _Files:
    """A folder of a local or shared disk; see `_Medium`."""

    seconds = FILE_SECONDS

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_new = True

    def contents(self) -> Iterator[bytes]:
        folder = self._path.parent
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            yield path.read_bytes()

    def append(self, data: bytes) -> None:
        folder = self._path.parent
        if self._is_new:
            folder.mkdir(exist_ok=True)  # what it is in comes and goes with the job
        with self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if self._is_new:
            fsync(folder)
            fsync(folder.parent)
        self._is_new = False


class _Objects:
    """A folder of an object store; see `_Medium`."""

    seconds = OBJECT_SECONDS

    def __init__(self, uri: str) -> None:
        root, _, name = uri.rpartition(f"/{PROGRESS}/")
        self._store: ObjectStore = open_store(root)
        self._prefix = f"{PROGRESS}/{name}"
        self._number = 0

    def contents(self) -> Iterator[bytes]:
        folder = self._prefix.rpartition("/")[0]
        for entry in self._store.entries(folder):
            found = self._store.read(f"{folder}/{entry.name}")
            if found is not None:
                yield found.data

    def append(self, data: bytes) -> None:
        self._store.write(f"{self._prefix}-{self._number:06d}", data)
        self._number += 1


def _digest(payload: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=16, key=key).digest()
