"""The directory of a datastore while one driver, which holds its lease, writes it.

    STORE/build.json             what fixes the content; written before any work
    STORE/_tmp/TOKEN/NAME        by a task of the driver with that token: a complete segment, or debris
    STORE/segments/NAME          promoted by the driver, one rename
    STORE/manifest.json          written last

A segment counts once the manifest names it. Its name says what is in it, so that a complete one is never made twice.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from actors.object_store import is_uri
from datastore.format import (
    MANIFEST,
    SEGMENTS,
    Manifest,
    SegmentRecord,
    check_sizes,
    read_manifest,
    read_record,
    write_manifest,
)
from jobs.files import read_json, write_json
from jobs.lease import Lease
from jobs.segments.chunks import Wanted
from pipeline.durable import fsync
from pipeline.errors import ConfigError, DatastoreError

BUILD = "build.json"

_VERSION = 1
_WORK = "_tmp"
_OWN = (MANIFEST, BUILD, SEGMENTS, _WORK, "_lease")

W = TypeVar("W", bound=Wanted)

log = logging.getLogger(__name__)


class StoreWriter:
    """The right to change a datastore; made by `writing_store`."""

    def __init__(self, path: Path, lease: Lease) -> None:
        self.path = path
        self._lease = lease
        self._work = path / _WORK / secrets.token_hex(4)

    def manifest(self) -> Manifest | None:
        """The published manifest; None before the first.

        Raises:
            DatastoreError: it is damaged.
        """
        return read_manifest(self.path) if (self.path / MANIFEST).exists() else None

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Record what fixes the content, and remove what killed tasks left behind.

        Raises:
            ConfigError: the directory holds segments of another content.
        """
        recorded = read_json(self.path / BUILD) or {}
        wanted = {"version": _VERSION, "fingerprint": json.loads(json.dumps(fingerprint))}
        # Before the first segment, a mistaken option can simply be corrected.
        if recorded != wanted and self._has_segments():
            raise ConfigError(_difference(self.path, recorded.get("fingerprint", {}), wanted["fingerprint"]))
        self.clean()
        if recorded != wanted:
            with self._lease.held():
                write_json(self.path / BUILD, wanted)

    def clean(self) -> None:
        """Remove what earlier drivers and their tasks left half done."""
        with self._lease.held():
            shutil.rmtree(self.path / _WORK, ignore_errors=True)
            for path in self.path.glob("*.tmp"):
                path.unlink(missing_ok=True)

    def finished(self, name: str) -> SegmentRecord | None:
        """The record of a segment that is complete; None if it has to be made."""
        record = read_record(self.path / SEGMENTS / name)
        if record is None or record.name != name:
            return None
        try:
            check_sizes(self.path, [record])
        except DatastoreError as error:
            log.warning("the segment %s is made again: %s", name, error)
            return None
        return record

    def work_directory(self, name: str) -> str:
        """Where a task makes a segment; another one for each driver, as tasks of a killed one may still run."""
        return str((self._work / name).absolute())

    def promote(self, name: str) -> None:
        """Move a complete segment from its work directory to its place.

        Raises:
            JobError: the lease is lost.
            DatastoreError: it is not there, or cannot be moved.
        """
        source, target = Path(self.work_directory(name)), self.path / SEGMENTS / name
        if read_record(source) is None:
            raise DatastoreError(
                f"the segment {source} is not visible to the driver. All nodes must see --output at the same path:"
                " choose a directory on a shared file system."
            )
        with self._lease.held(), _writing(target):
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            source.rename(target)
            fsync(target.parent)

    def publish(self, manifest: Manifest) -> None:
        """Remove all segments that the manifest does not name, then write it.

        Raises:
            JobError: the lease is lost.
            DatastoreError: the directory cannot be written.
        """
        with self._lease.held():
            self._remove_others({segment.name for segment in manifest.segments})
            write_manifest(self.path, manifest)
            shutil.rmtree(self.path / _WORK, ignore_errors=True)

    def _remove_others(self, names: Collection[str]) -> None:
        for path in sorted((self.path / SEGMENTS).glob("*")):
            if path.name not in names:
                log.warning("removing the segment %s, which is not of this corpus or not complete", path.name)
                with _writing(path):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _has_segments(self) -> bool:
        return (self.path / MANIFEST).exists() or any((self.path / SEGMENTS).glob("*"))


@contextlib.contextmanager
def writing_store(path: Path) -> Iterator[StoreWriter]:
    """The lease of a datastore's directory, made if absent, for the length of the context.

    Raises:
        ConfigError: it holds other things, cannot be written, or another driver is at work in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        strange = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(_OWN))
        if strange:
            raise ConfigError(
                f"--output is {str(path)!r}; it holds {strange[0]!r}, which is no part of a datastore. Choose a new or"
                " empty directory."
            )
        lease = Lease(path)
    except OSError as error:
        raise ConfigError(f"--output is {str(path)!r}; it cannot be written: {error.strerror}.") from error
    with lease:
        yield StoreWriter(path, lease)


def check_published(wanted: Iterable[W], manifest: Manifest, path: Path) -> Iterator[W]:
    """The segments that a complete datastore should have, each seen to be one that it has.

    Raises:
        ConfigError: the corpus is not the one that the datastore was built from.
    """
    names = {_number(segment.name): segment.name for segment in manifest.segments}
    for each in wanted:
        # Of a chunk without a single token there is no segment.
        if (found := names.get(_number(each.name), each.name)) != each.name:
            raise ConfigError(
                f"--output {path} holds a complete datastore of other documents: its segment {found} would now be"
                f" {each.name}. Restore the corpus, choose another --output, or add to it with `rasd datastore append`."
            )
        yield each


def repaired(manifest: Manifest, made: Iterable[SegmentRecord]) -> tuple[SegmentRecord, ...]:
    """The manifest's segments, those that were made again with their new records."""
    new = {record.name: record for record in made}
    return tuple(new.get(record.name, record) for record in manifest.segments)


def next_number(manifest: Manifest) -> int:
    """Number of the next segment to be added."""
    numbers = [int(_number(segment.name)) for segment in manifest.segments if _number(segment.name).isdigit()]
    return max([len(manifest.segments), *(number + 1 for number in numbers)])


def store_directory(output: str) -> Path:
    """The directory that `--output` names.

    Raises:
        ConfigError: it would vanish with a submitted job, or is a URI.
    """
    if is_uri(output):
        raise ConfigError(
            f"--output is {output!r}; a datastore is files that are mapped into memory. Build it in a directory that"
            " all nodes see, and copy that to the object store if it is to be kept there."
        )
    path = Path(output).expanduser()
    # Set by Ray's job server, which runs the command in a temporary copy of the submitted directory.
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not path.is_absolute():
        raise ConfigError(
            f"--output is {output!r}; a submitted job runs in a directory that Ray removes. Give an absolute path that"
            " all nodes see."
        )
    return path


def _number(name: str) -> str:
    return name.partition("-")[0]


def _difference(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    lines = "; ".join(f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}" for key in changed)
    return (
        f"--output {path} holds a datastore of other content: {lines}. Restore those options, choose another --output,"
        " or add to it with `rasd datastore append`."
    )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatastoreError(
            f"cannot write {path}: {error.strerror or error}. Free space or mend the directory; the same command then"
            " goes on."
        ) from error
