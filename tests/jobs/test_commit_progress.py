"""What becomes of the progress of a shard, on a disk and on a real S3 server."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from actors.shard_progress import ShardProgress
from jobs.commit import CommitLog
from jobs.storage import HeldLease, Storage, open_storage
from tests.actors.test_shard_progress import a_record
from tests.jobs.parts import SCHEMA, write_part

FINGERPRINT = {"seed": 0}


@pytest.fixture(params=["disk", "s3"])
def storage(tmp_path: Path, request: pytest.FixtureRequest) -> Storage:
    return open_storage(str(tmp_path) if request.param == "disk" else request.getfixturevalue("uri"))


@pytest.fixture
def lease(storage: Storage) -> Iterator[HeldLease]:
    with storage.lease() as lease:
        yield lease


def open_log(storage: Storage, lease: HeldLease) -> CommitLog:
    log = CommitLog(storage, lease)
    log.open()
    log.keep_progress(FINGERPRINT)
    return log


def keep_rows(log: CommitLog, shard: int, attempt: int, *rows: int) -> None:
    ShardProgress(log.progress(shard, attempt), SCHEMA).save([a_record(row) for row in rows])


def kept_rows(log: CommitLog, shard: int) -> list[int]:
    return sorted(row for row, _ in ShardProgress(log.progress(shard, 9), SCHEMA).read())


def test_it_is_removed_with_the_commit_of_its_shard_and_of_no_other(storage: Storage, lease: HeldLease) -> None:
    log = open_log(storage, lease)
    for shard in (0, 1, 10):
        keep_rows(log, shard, 1000, 3 * shard)
        keep_rows(log, shard, 1001, 3 * shard + 1)
    assert kept_rows(log, 1) == [3, 4]
    log.commit(replace(write_part(log, 0), has_progress=True))
    assert storage.progress_shards() == {1, 10}
    assert kept_rows(open_log(storage, lease), 1) == [3, 4], "the next run finds it"
    log.finish()
    assert storage.progress_shards() == set()


def test_what_a_crash_or_a_late_replica_left_of_a_committed_shard_is_removed(
    storage: Storage, lease: HeldLease
) -> None:
    log = open_log(storage, lease)
    log.commit(write_part(log, 0))
    keep_rows(log, 0, 1000, 0)
    keep_rows(log, 1, 1000, 3)
    log = open_log(storage, lease)
    assert storage.progress_shards() == {1}
    assert (kept_rows(log, 0), kept_rows(log, 1)) == ([], [3])


def test_without_a_fingerprint_nothing_is_kept(storage: Storage, lease: HeldLease) -> None:
    assert CommitLog(storage, lease).progress(0, 0) is None
