"""A job's output on an object store, which has neither rename nor lock (design section 8).

    URI/part-SHARD-ATTEMPT-RUN.parquet   put by a replica at its final key; RUN names one run of a driver
    URI/_commits/SHARD.json              put by the driver, only if absent
    URI/_progress/SHARD/...              put by replicas, see `actors.shard_progress`
    URI/_lease                           see `jobs.object_lease`

Why no shard can come out twice, whatever the lease does: readers trust only what a commit record names, a record is
created only if absent, and no two attempts share a key. Of two drivers that both think they hold the lease, the first
to commit a shard wins; the second sees the record, adopts it, and removes its own part. One case is left: a driver
that was silent for so long that its lease was taken over wakes between its look at the lease and its commit, and
commits a part that its successor has swept away. Its record then names nothing. Whoever finds that puts another
record in its place, if it is still the very record that was found (`If-Match`).
"""

import contextlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from actors.object_store import Entry, ObjectStoreError, Version, open_store, split
from actors.rows import ShardResult
from actors.shard_progress import PROGRESS
from jobs.object_lease import LEASE, ObjectLease, check_conditions, holder_of
from pipeline.errors import JobError

_PART = re.compile(r"part-\d{6,}-\d{6,}-[0-9a-f]{8}\.parquet")
_CONNECTIONS = 16


class ObjectStorage:
    """A prefix of an object store; see `Storage`.

    Args:
        uri: such as `s3://bucket/prefix`.

    Raises:
        ConfigError: it cannot be used.
    """

    def __init__(self, uri: str) -> None:
        self._store = open_store(uri.rstrip("/"))
        self._run = secrets.token_hex(4)
        self._read: dict[str, Version] = {}
        self._retired: dict[str, Version] = {}

    def where(self, key: str = "") -> str:
        return f"{self._store.uri}/{key}" if key else self._store.uri

    def prepare(self) -> None:
        check_conditions(self._store)

    def lease(self) -> ObjectLease:
        return ObjectLease(self._store)

    def holder(self) -> str | None:
        with _answering():
            return holder_of(self._store)

    def names(self) -> set[str]:
        return set(self._store.names())

    def entries(self, folder: str = "") -> list[Entry]:
        with _answering():
            return self._store.entries(folder)

    def size(self, key: str) -> int | None:
        with _answering():
            found = self._store.head(key)
        return None if found is None else found.bytes

    def read(self, key: str) -> bytes | None:
        with _answering():
            found = self._store.read(key)
        if found is None:
            self._read.pop(key, None)
            return None
        self._read[key] = found.version
        return found.data

    def read_all(self, keys: Iterable[str]) -> Iterator[bytes | None]:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            yield from pool.map(self.read, keys)

    def open(self, key: str) -> pa.NativeFile:
        found = self._store.read(key)
        if found is None:
            raise FileNotFoundError(f"{self.where(key)} is not there")
        return pa.BufferReader(found.data)

    def write(self, key: str, value: Mapping[str, Any]) -> None:
        with _answering():
            self._store.write(key, _json(value))

    def write_text(self, key: str, text: str) -> None:
        with _answering():
            self._store.write(key, text.encode())

    def create(self, key: str, value: Mapping[str, Any]) -> bool:
        retired = self._retired.pop(key, None)
        with _answering():
            if retired is None:
                return self._store.create(key, _json(value)) is not None
            return self._store.replace(key, _json(value), retired) is not None

    def retire(self, key: str) -> None:
        # Not removed: the client offers no removal on a condition, and by now it may be another's good record.
        if key in self._read:
            self._retired[key] = self._read[key]

    def part_path(self, shard: int, attempt: int) -> str:
        return self.where(f"part-{shard:06d}-{attempt:06d}-{self._run}.parquet")

    def progress_path(self, shard: int, attempt: int) -> str:
        return self.where(f"{PROGRESS}/{shard:06d}/{attempt:06d}-{self._run}")

    def progress_shards(self) -> set[int]:
        with _answering():
            return {int(name) for name in self._store.folders(PROGRESS) if name.isdecimal()}

    def remove_progress(self, shards: Iterable[int]) -> None:
        for folder in (f"{PROGRESS}/{shard:06d}" for shard in shards):
            keys = [f"{folder}/{entry.name}" for entry in self.entries(folder)]
            with _answering(), ThreadPoolExecutor(_CONNECTIONS) as pool:
                list(pool.map(lambda key: self._store.remove([key]), keys))

    def promote(self, result: ShardResult) -> str:
        name = split(result.path)[1]
        size = self.size(name)
        if size is None:
            raise JobError(
                f"part file {result.path} of shard {result.shard} is not there for the driver. Somebody removed it, or"
                " the nodes' environments name different endpoints; run the same command again once that is mended."
            )
        if size != result.bytes:
            raise JobError(
                f"part file {result.path} has {size} bytes, but its replica wrote {result.bytes}. Something else writes"
                " to --output; run the same command again once that is mended."
            )
        return name

    def discard(self, path: str) -> None:
        with _answering():
            self._store.remove([split(path)[1]])

    def sweep(self, named: Callable[[], set[str]]) -> None:
        # Listed before it is asked what is named: a part that is put and committed meanwhile is not in the list.
        found = [entry.name for entry in self.entries()]
        kept = named()
        strays = [name for name in found if _PART.fullmatch(name) and name not in kept]
        probes = [name for name in found if name.startswith(f"{LEASE}.")]
        with _answering():
            self._store.remove(strays + probes)

    def finish(self, named: Callable[[], set[str]]) -> None:
        # A replica that was given up for lost may have put its part since the job began, and progress since its commit.
        self.sweep(named)
        self.remove_progress(self.progress_shards())


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Turn what an object store refuses into JobError."""
    try:
        yield
    except ObjectStoreError as error:
        raise JobError(f"{error}. Once that is mended, the same command resumes the job.") from error
