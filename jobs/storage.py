"""Where a job's output is: a directory, or a prefix of an object store behind the same few methods.

The rest of `jobs` says what must happen to plan, parts and records; a storage knows how that is done safely. See
`LocalStorage` here and `jobs.object_storage.ObjectStorage`.
"""

import json
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self

import pyarrow as pa

from actors.object_store import Entry, is_uri
from actors.rows import ShardResult
from actors.shard_progress import PROGRESS
from jobs.files import create_json, write_json, writing
from jobs.lease import Lease, live_holder
from pipeline.durable import fsync, replace_text
from pipeline.errors import JobError

COMMITS = "_commits"
PLAN = "plan.json"
REPORT = "report.json"
PAGE = "report.html"

_PART = re.compile(r"part-\d{6,}\.parquet")
_DEBRIS = ("_tmp/*", "_commits/*.tmp", "_lease.*.tmp", "plan.json.*.tmp", "report.json.*.tmp", "report.html.*.tmp")


class HeldLease(Protocol):
    """The right to commit to an output; a context manager that releases it."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

    def held(self) -> AbstractContextManager[None]:
        """A section that begins only while the lease is ours; raises JobError if somebody took it over."""


class Storage(Protocol):
    """A job's output. Keys are relative to it, with `/`; what changes something raises JobError if it cannot."""

    def where(self, key: str = "") -> str:
        """What a person calls it: a path or a URI."""

    def prepare(self) -> None:
        """Make it ready for a lease; raises OSError, or ConfigError if it cannot hold a job's output."""

    def lease(self) -> HeldLease:
        """Take the lease; raises ConfigError while a live driver holds it, and OSError."""

    def holder(self) -> str | None:
        """Who works on it now, for people; None if nobody does."""

    def names(self) -> set[str]:
        """Names of all that it holds at its top, none if it does not exist; raises OSError."""

    def entries(self, folder: str = "") -> list[Entry]:
        """The files right in a folder, none if there is no such folder."""

    def size(self, key: str) -> int | None:
        """Bytes of a file, None if there is none."""

    def read(self, key: str) -> bytes | None:
        """A small file, None if there is none."""

    def read_all(self, keys: Iterable[str]) -> Iterator[bytes | None]:
        """Many small files, in order."""

    def open(self, key: str) -> pa.NativeFile:
        """A file to read from; raises OSError."""

    def write(self, key: str, value: Mapping[str, Any]) -> None:
        """Replace a file by JSON, whole or not at all."""

    def write_text(self, key: str, text: str) -> None:
        """Replace a file by text that nobody relies on."""

    def create(self, key: str, value: Mapping[str, Any]) -> bool:
        """Create a file with JSON only if there is none, or one that was retired; False if there is another."""

    def retire(self, key: str) -> None:
        """A record is untrue, or is to be replaced, as it was last read: make room for another."""

    def part_path(self, shard: int, attempt: int) -> str:
        """Where a replica writes the part file of an attempt at a shard."""

    def progress_path(self, shard: int, attempt: int) -> str:
        """Where it keeps the rows that it has finished; see `actors.shard_progress`."""

    def progress_shards(self) -> set[int]:
        """The shards of which some rows are kept."""

    def remove_progress(self, shards: Iterable[int]) -> None:
        """Remove what is kept of them."""

    def promote(self, result: ShardResult) -> str:
        """Make a replica's part file one of the output; returns its key. Raises JobError if it is not as reported."""

    def discard(self, path: str) -> None:
        """Remove a replica's part file that is not wanted."""

    def sweep(self, named: Callable[[], set[str]]) -> None:
        """Remove what crashes left behind: part files but those `named`, and temporary files."""

    def finish(self, named: Callable[[], set[str]]) -> None:
        """The same, after the last commit."""


def open_storage(output: "str | Path | Storage") -> Storage:
    """The storage behind what a user gave as a job's output.

    Raises:
        ConfigError: a URI that cannot be used.
    """
    if isinstance(output, str) and is_uri(output) and not output.startswith("file://"):
        from jobs.object_storage import ObjectStorage

        return ObjectStorage(output)
    if isinstance(output, str):
        output = Path(output.removeprefix("file://")).expanduser()
    return LocalStorage(output) if isinstance(output, Path) else output


def job_name(output: str) -> str:
    """The same on every node: a URI, or the directory's absolute path."""
    output = output.removeprefix("file://")
    return output.rstrip("/") if is_uri(output) else str(Path(output).expanduser().absolute())


def parse_json(data: bytes | None) -> dict[str, Any] | None:
    """The JSON object in a file's bytes, or None if there is no file or it holds anything else."""
    try:
        value = json.loads(data) if data is not None else None
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def read_plan(storage: Storage) -> dict[str, Any] | None:
    """plan.json of an output, None if it has none."""
    return parse_json(storage.read(PLAN))


class LocalStorage:
    """A directory on a local or shared file system; see `Storage`.

    Parts are written under `_tmp` and renamed by the driver, records are published by a hard link, and no driver can
    take the lease over between the check of it and the commit: it has a lock.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def where(self, key: str = "") -> str:
        return str(self.directory / key)

    def prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)

    def lease(self) -> HeldLease:
        return Lease(self.directory)

    def holder(self) -> str | None:
        return live_holder(self.directory)

    def names(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()} if self.directory.exists() else set()

    def entries(self, folder: str = "") -> list[Entry]:
        return sorted(self._entries(self.directory / folder), key=lambda entry: entry.name)

    def size(self, key: str) -> int | None:
        return next((entry.bytes for entry in _entry(self.directory / key)), None)

    def read(self, key: str) -> bytes | None:
        try:
            return (self.directory / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_all(self, keys: Iterable[str]) -> Iterator[bytes | None]:
        return map(self.read, keys)

    def open(self, key: str) -> pa.NativeFile:
        return pa.OSFile(str(self.directory / key))

    def write(self, key: str, value: Mapping[str, Any]) -> None:
        write_json(self.directory / key, value)

    def write_text(self, key: str, text: str) -> None:
        path = self.directory / key
        with writing(path):
            replace_text(path, text)

    def create(self, key: str, value: Mapping[str, Any]) -> bool:
        create_json(self.directory / key, value)  # raises JobError if it exists: under the lock, nobody else made it
        return True

    def retire(self, key: str) -> None:
        with writing(self.directory / key):
            (self.directory / key).unlink()
            fsync((self.directory / key).parent)

    def part_path(self, shard: int, attempt: int) -> str:
        return str((self.directory / "_tmp" / f"{shard:06d}.{attempt:06d}.parquet").absolute())

    def progress_path(self, shard: int, attempt: int) -> str:
        return str((self.directory / PROGRESS / f"{shard:06d}" / f"{attempt:06d}").absolute())

    def progress_shards(self) -> set[int]:
        try:
            return {int(path.name) for path in (self.directory / PROGRESS).iterdir() if path.name.isdecimal()}
        except (FileNotFoundError, NotADirectoryError):  # a live driver removes it at its end
            return set()

    def remove_progress(self, shards: Iterable[int]) -> None:
        for shard in shards:
            shutil.rmtree(self.directory / PROGRESS / f"{shard:06d}", ignore_errors=True)

    def promote(self, result: ShardResult) -> str:
        source, name = Path(result.path), f"part-{result.shard:06d}.parquet"
        try:
            size = source.stat().st_size
        except FileNotFoundError as error:
            raise JobError(
                f"part file {source} of shard {result.shard} is not visible to the driver. All nodes must see --output"
                " at the same path: choose a directory on a shared file system, or an object store."
            ) from error
        if size != result.bytes:
            raise JobError(
                f"part file {source} has {size} bytes, but its replica wrote {result.bytes}. Something else writes to"
                " --output, or the file system loses data; run the same command again once that is mended."
            )
        with writing(self.directory / name):
            source.replace(self.directory / name)
            fsync(self.directory)
        return name

    def discard(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)

    def sweep(self, named: Callable[[], set[str]]) -> None:
        for name in ("_tmp", COMMITS, PROGRESS):
            (self.directory / name).mkdir(exist_ok=True)
        fsync(self.directory)  # a record may go once its rows are safe in there
        kept = named()
        for path in self.directory.iterdir():
            if _PART.fullmatch(path.name) and path.name not in kept:
                path.unlink()
        for pattern in _DEBRIS:
            for path in self.directory.glob(pattern):
                path.unlink()

    def finish(self, named: Callable[[], set[str]]) -> None:
        for name in ("_tmp", PROGRESS):
            shutil.rmtree(self.directory / name, ignore_errors=True)

    def _entries(self, directory: Path) -> Iterator[Entry]:
        for path in directory.iterdir() if directory.is_dir() else ():
            yield from _entry(path)


def _entry(path: Path) -> Iterator[Entry]:
    """Of a file, unless it is gone: a live driver makes and removes temporary ones all the time."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISREG(found.st_mode):
        yield Entry(path.name, found.st_size, found.st_mtime)
