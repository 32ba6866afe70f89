"""The commit protocol of an output (design section 8).

    OUTPUT/_tmp/SHARD.ATTEMPT.parquet   by a replica, complete and synced
    OUTPUT/part-000000.parquet          promoted by the driver that holds the lease
    OUTPUT/_commits/000000.json         written last, created only if absent
    OUTPUT/_progress/000000/ATTEMPT     by a replica, the rows that it has finished so far, every few seconds

On an object store a part is put at its final key at once; see `jobs.object_storage`. A shard is done if and only if
its commit record exists. Until then the next attempt at it begins with its progress, which is removed afterwards; see
`actors.shard_progress`. Anything else is debris of a crash, and is removed.

A commit can be taken back so that failed rows are tried again: first the rows that are fine become progress, then the
record goes. On an object store, which has no removal on a condition, it stays until a new one replaces it, and a crash
before that leaves the shard as it was.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.object_store import Entry, sizes
from actors.rows import ProgressPlace, ShardResult, ShardStats
from actors.shard_progress import progress_key
from jobs.storage import COMMITS, HeldLease, Storage, open_storage, parse_json, read_plan
from pipeline.errors import InputError, JobError

_RECORD = re.compile(r"(\d{6,})\.json")
_TRIES = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Commit:
    """What readers may rely on: this file, with these rows and bytes, is the shard's output."""

    shard: int
    file: str
    rows: int
    bytes: int
    sha256: str
    attempt: int
    stats: ShardStats


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A committed part file, to be read; its `str` is what a person calls it."""

    storage: Storage
    key: str

    def open(self) -> pa.NativeFile:
        """Its bytes; raises OSError."""
        return self.storage.open(self.key)

    def __str__(self) -> str:
        return self.storage.where(self.key)


class CommitLog:
    """The committed shards of one output.

    Args:
        output: its storage, or its directory; created parts of the layout appear as needed.
        lease: held by this driver; checked before every change.
    """

    def __init__(self, output: Storage | Path, lease: HeldLease) -> None:
        self._storage = open_storage(output)
        self._lease = lease
        self._commits: dict[int, Commit] = {}
        self._progress_key: bytes | None = None

    def open(self) -> dict[int, Commit]:
        """Read the commits and remove everything that none of them names; returns them by shard.

        Raises:
            JobError: the lease is lost.
        """
        with self._lease.held():
            self._storage.sweep(self._read_intact)
            self._storage.remove_progress(self._storage.progress_shards() & self._commits.keys())
        return dict(self._commits)

    def part_path(self, shard: int, attempt: int) -> str:
        """Where a replica writes this attempt at a shard."""
        return self._storage.part_path(shard, attempt)

    def keep_progress(self, fingerprint: Mapping[str, Any]) -> None:
        """From now on rows are kept that replicas finish of shards that are not committed.

        Args:
            fingerprint: of the job; only rows by a job of the same are taken over.
        """
        self._progress_key = progress_key(fingerprint)

    def progress(self, shard: int, attempt: int) -> ProgressPlace | None:
        """Where an attempt keeps them; None before `keep_progress`."""
        if self._progress_key is None:
            return None
        return ProgressPlace(self._storage.progress_path(shard, attempt), self._progress_key)

    def commit(self, result: ShardResult) -> Commit:
        """Promote a finished part file and record it; a shard that is committed already stays as it is.

        Raises:
            JobError: the lease is lost, or the part file is not what the replica reported.
        """
        with self._lease.held():
            if (done := self._commits.get(result.shard)) is not None:
                self.discard(result)
                return done
            commit = Commit(
                shard=result.shard,
                file=self._storage.promote(result),
                rows=result.rows,
                bytes=result.bytes,
                sha256=result.sha256,
                attempt=result.attempt,
                stats=result.stats,
            )
            recorded = self._record(commit)
            if recorded is not commit:
                log.warning("shard %d was committed by another driver already; its rows stay", result.shard)
                self.discard(result)
            if result.has_progress:
                self._storage.remove_progress([result.shard])
        self._commits[result.shard] = recorded
        return recorded

    def reopen(self, shard: int) -> None:
        """Take a commit back: its shard is unfinished again. The rows to keep must be in its progress by now."""
        with self._lease.held():
            self._storage.retire(record_key(shard))
        del self._commits[shard]

    def discard(self, result: ShardResult) -> None:
        """Remove a part file that is not to be committed; raises JobError."""
        self._storage.discard(result.path)

    def finish(self) -> None:
        """Remove what is temporary once every shard is committed."""
        with self._lease.held():
            self._storage.finish(lambda: {commit.file for commit, _ in read_commits(self._storage) if commit})

    def _record(self, commit: Commit) -> Commit:
        """The commit that a shard has from now on: this one, or that of a driver that was quicker."""
        key = record_key(commit.shard)
        for _ in range(_TRIES):
            if self._storage.create(key, asdict(commit)):
                return commit
            found = _parse(parse_json(self._storage.read(key)))
            if found is not None and found.file != commit.file and self._storage.size(found.file) == found.bytes:
                return found
            # It names a part that is not there, see `jobs.object_storage`.
            self._storage.retire(key)
        raise JobError(
            f"{self._storage.where(key)} is written by others all the time. Stop what else writes to --output; the"
            " same command then resumes the job."
        )

    def _read_intact(self) -> set[str]:
        """Take over the records whose part files are there; returns these files."""
        self._commits = {}
        found = sizes(self._storage.entries())
        for commit, record in read_commits(self._storage):
            if commit is not None:
                size = found.get(commit.file)
                if (self._storage.size(commit.file) if size is None else size) == commit.bytes:
                    self._commits[commit.shard] = commit
                    continue
            # Not made by a crash of ours (the record comes last): somebody removed or changed the file.
            log.warning("the part file of %s is missing or changed; its shard will be generated again", record.name)
            self._storage.retire(f"{COMMITS}/{record.name}")
        return {commit.file for commit in self._commits.values()}


def record_key(shard: int) -> str:
    """Where a shard's commit record is, or will be."""
    return f"{COMMITS}/{shard:06d}.json"


def read_commits(output: Storage | Path) -> Iterator[tuple[Commit | None, Entry]]:
    """Each commit record of an output in shard order, None if it is unreadable, with its file."""
    storage = open_storage(output)
    records = [entry for entry in storage.entries(COMMITS) if _RECORD.fullmatch(entry.name)]
    records.sort(key=lambda entry: int(entry.name.partition(".")[0]))
    contents = storage.read_all(f"{COMMITS}/{entry.name}" for entry in records)
    for entry, content in zip(records, contents, strict=True):
        yield _parse(parse_json(content)), entry


def committed_parts(output: Storage, name: str) -> Iterator[StoredPart]:
    """The part files of a job's output in shard order, as another job reads them; of an unfinished job those it has.

    Args:
        name: of the job, as the user wrote it.

    Raises:
        InputError: a commit record is damaged, or a part file is not what it says.
    """
    commits = list(read_commits(output))
    num_shards = int((read_plan(output) or {}).get("num_shards", 0))
    if len(commits) < num_shards:
        log.warning("%s is not finished: %d of %d shards are read", name, len(commits), num_shards)
    remedy = "Run the job's command again; it makes that shard anew."
    found = sizes(output.entries())
    for commit, record in commits:
        if commit is None:
            raise InputError(f"{output.where(COMMITS)}/{record.name} is damaged. {remedy}")
        size = found.get(commit.file)
        if size != commit.bytes:
            problem = "is missing" if size is None else f"has {size:,} bytes"
            raise InputError(f"{output.where(commit.file)} {problem}, its commit says {commit.bytes:,}. {remedy}")
        yield StoredPart(output, commit.file)


def _parse(record: dict[str, Any] | None) -> Commit | None:
    try:
        return Commit(**{**(record or {}), "stats": ShardStats(**(record or {})["stats"])})
    except (KeyError, TypeError):
        return None
