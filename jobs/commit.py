"""The commit protocol of an output directory (design section 8).

    OUTPUT/_tmp/SHARD.ATTEMPT.parquet   by a replica, complete and synced
    OUTPUT/part-000000.parquet          promoted by the driver that holds the lease
    OUTPUT/_commits/000000.json         written last, created only if absent

A shard is done if and only if its commit record exists. Anything else is debris of a crash, and is removed.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.rows import ShardResult, ShardStats
from jobs.files import create_json, read_json, writing
from jobs.lease import Lease
from pipeline.durable import fsync
from pipeline.errors import InputError, JobError

_PART = re.compile(r"part-(\d{6,})\.parquet")
_DEBRIS = ("_tmp/*", "_commits/*.tmp", "_lease.*.tmp", "plan.json.*.tmp", "report.json.*.tmp")
_COMMIT = re.compile(r"(\d{6,})\.json")

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


class CommitLog:
    """The committed shards of one output directory.

    Args:
        output: the directory; created parts of the layout appear as needed.
        lease: held by this driver; checked before every change.
    """

    def __init__(self, output: Path, lease: Lease) -> None:
        self._output = output
        self._lease = lease
        self._commits: dict[int, Commit] = {}

    def open(self) -> dict[int, Commit]:
        """Read the commits and remove everything that none of them names; returns them by shard.

        Raises:
            JobError: the lease is lost.
        """
        with self._lease.held():
            for name in ("_tmp", "_commits"):
                (self._output / name).mkdir(exist_ok=True)
            self._commits = {commit.shard: commit for commit in self._intact_commits()}
            kept = {commit.file for commit in self._commits.values()}
            for path in self._output.iterdir():
                if _PART.fullmatch(path.name) and path.name not in kept:
                    path.unlink()
            for pattern in _DEBRIS:
                for path in self._output.glob(pattern):
                    path.unlink()
        return dict(self._commits)

    def part_path(self, shard: int, attempt: int) -> Path:
        """Where a replica writes this attempt at a shard."""
        return (self._output / "_tmp" / f"{shard:06d}.{attempt:06d}.parquet").absolute()

    def commit(self, result: ShardResult) -> Commit:
        """Promote a finished part file and record it; a shard that is committed already stays as it is.

        Raises:
            JobError: the lease is lost, or the part file is not what the replica reported.
        """
        source = Path(result.path)
        with self._lease.held():
            if (done := self._commits.get(result.shard)) is not None:
                source.unlink(missing_ok=True)
                return done
            self._check(source, result)
            commit = Commit(
                shard=result.shard,
                file=f"part-{result.shard:06d}.parquet",
                rows=result.rows,
                bytes=result.bytes,
                sha256=result.sha256,
                attempt=result.attempt,
                stats=result.stats,
            )
            with writing(self._output / commit.file):
                source.replace(self._output / commit.file)
                fsync(self._output)
            create_json(record_path(self._output, result.shard), asdict(commit))
        self._commits[result.shard] = commit
        return commit

    def finish(self) -> None:
        """Remove the directory of temporary parts once every shard is committed."""
        with self._lease.held():
            shutil.rmtree(self._output / "_tmp", ignore_errors=True)

    def _check(self, source: Path, result: ShardResult) -> None:
        try:
            size = source.stat().st_size
        except FileNotFoundError as error:
            raise JobError(
                f"part file {source} of shard {result.shard} is not visible to the driver. All nodes must see --output"
                " at the same path: choose a directory on a shared file system."
            ) from error
        if size != result.bytes:
            raise JobError(
                f"part file {source} has {size} bytes, but its replica wrote {result.bytes}. Something else writes to"
                " --output, or the file system loses data; run the same command again once that is mended."
            )

    def _intact_commits(self) -> Iterator[Commit]:
        for commit, path in read_commits(self._output):
            part = self._output / commit.file if commit else None
            if commit and part and part.exists() and part.stat().st_size == commit.bytes:
                yield commit
                continue
            # Not made by a crash of ours (the record comes last): somebody removed or changed the file.
            log.warning("the part file of %s is missing or changed; its shard will be generated again", path.name)
            path.unlink()


def record_path(output: Path, shard: int) -> Path:
    """Where a shard's commit record is, or will be."""
    return output / "_commits" / f"{shard:06d}.json"


def read_commits(output: Path) -> Iterator[tuple[Commit | None, Path]]:
    """Each commit record of a directory in shard order, None if it is unreadable, with its path."""
    paths = [path for path in (output / "_commits").glob("*.json") if _COMMIT.fullmatch(path.name)]
    for path in sorted(paths, key=lambda path: int(path.stem)):
        yield _parse(read_json(path)), path


def committed_parts(output: Path, name: str) -> Iterator[Path]:
    """The part files of a job's output in shard order, as another job reads them; of an unfinished job those it has.

    Args:
        name: of the job, as the user wrote it.

    Raises:
        InputError: a commit record is damaged, or a part file is not what it says.
    """
    commits = list(read_commits(output))
    num_shards = int((read_json(output / "plan.json") or {}).get("num_shards", 0))
    if len(commits) < num_shards:
        log.warning("%s is not finished: %d of %d shards are read", name, len(commits), num_shards)
    remedy = "Run the job's command again; it makes that shard anew."
    for commit, path in commits:
        if commit is None:
            raise InputError(f"{path} is damaged. {remedy}")
        part = output / commit.file
        size = part.stat().st_size if part.is_file() else None
        if size != commit.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise InputError(f"{part} {found}, its commit says {commit.bytes:,}. {remedy}")
        yield part


def _parse(record: dict[str, Any] | None) -> Commit | None:
    try:
        return Commit(**{**(record or {}), "stats": ShardStats(**(record or {})["stats"])})
    except (KeyError, TypeError):
        return None
