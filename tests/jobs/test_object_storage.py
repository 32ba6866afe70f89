"""The commit protocol on a real S3 server: whatever dies or stalls, no shard is committed to two files."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.object_store import open_store
from actors.rows import ShardResult
from jobs.commit import CommitLog, read_commits, record_key
from jobs.object_lease import check_conditions
from jobs.storage import Storage, open_storage
from pipeline.errors import ConfigError, JobError
from tests.jobs.crashing_commits import crash_at_each_step
from tests.jobs.parts import write_part


class Stalled:
    """The lease of a driver that had looked at it when it was stopped, and goes on long after."""

    def __enter__(self) -> "Stalled":
        return self

    def __exit__(self, *_: object) -> None:
        """Its lease is another's by now."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        yield


def part_names(storage: Storage) -> set[str]:
    return {name for name in storage.names() if name.startswith("part-")}


def rows_of(storage: Storage) -> list[int]:
    """Row indices of everything that is committed, as a reader gets them."""
    tables = [pq.read_table(storage.open(commit.file)) for commit, _ in read_commits(storage) if commit]
    return pa.concat_tables(tables)["row_index"].to_pylist() if tables else []


@pytest.mark.parametrize(
    ("ignored", "message"), [("create", "creating only if absent"), ("e_tag", "replacing only what was read")]
)
def test_a_store_without_conditions_is_refused(
    uri: str, monkeypatch: pytest.MonkeyPatch, ignored: str, message: str
) -> None:
    put = obstore.put

    def careless(store: Any, key: str, data: bytes, **options: Any) -> Any:
        if ignored in options.get("mode", ()):  # the string "create", or a dict with the key "e_tag"
            del options["mode"]
        return put(store, key, data, **options)

    monkeypatch.setattr(obstore, "put", careless)
    with pytest.raises(ConfigError, match=f"on a store that does not support {message}"):
        check_conditions(open_store(uri))
    assert open_store(uri).names() == []


@pytest.mark.chaos
def test_crash_before_any_request_of_a_commit_loses_and_doubles_nothing(uri: str) -> None:
    num_requests, outcomes = crash_at_each_step(uri, "commit"), set()
    for number in range(1, num_requests + 1):
        storage = open_storage(f"{uri}/{number}")
        with storage.lease() as lease:
            log = CommitLog(storage, lease)
            kept = log.open()
            outcomes.add(len(kept))
            assert part_names(storage) == {commit.file for commit in kept.values()}
            log.commit(write_part(log, 0, attempt=2))
            log.commit(write_part(log, 1, attempt=2))
            log.finish()
        assert rows_of(storage) == [0, 1, 2, 3, 4, 5]
        assert len(part_names(storage)) == 2
        assert storage.names() - part_names(storage) == {"_commits", "_lease"}
    assert num_requests > 15
    assert outcomes == {0, 1}


def test_parts_without_a_record_are_removed_and_strangers_are_kept(uri: str) -> None:
    storage = open_storage(uri)
    with storage.lease() as lease:
        log = CommitLog(storage, lease)
        log.open()
        first = log.commit(write_part(log, 0))
        stray = write_part(log, 1).path
        for name in ("notes.txt", "part-mine.parquet", "_lease.0123"):
            open_store(uri).write(name, b"x")
        assert stray.rpartition("/")[2] in part_names(storage)
        assert CommitLog(storage, lease).open() == {0: first}
        assert part_names(storage) == {first.file, "part-mine.parquet"}
        late = write_part(log, 0, attempt=5)
        log.finish()
        assert late.path.rpartition("/")[2] not in part_names(storage)
    assert storage.names() == {"_commits", "_lease", first.file, "notes.txt", "part-mine.parquet"}


def test_second_commit_of_a_shard_by_the_same_driver_changes_nothing(uri: str) -> None:
    storage = open_storage(uri)
    with storage.lease() as lease:
        log = CommitLog(storage, lease)
        log.open()
        first = log.commit(write_part(log, 0, attempt=1))
        assert log.commit(write_part(log, 0, attempt=2)) == first
    assert part_names(storage) == {first.file}


def test_of_two_drivers_that_both_think_they_hold_the_lease_the_first_wins(uri: str) -> None:
    logs = [CommitLog(open_storage(uri), Stalled()) for _ in range(2)]
    for log in logs:
        log.open()
    # The same attempt, too; and as the rounds of two runs differ, so do the bytes.
    results = [write_part(log, 0, rows=rows) for log, rows in zip(logs, (3, 2), strict=True)]
    first = logs[0].commit(results[0])
    record = open_storage(uri).read(record_key(0))
    assert logs[1].commit(results[1]) == first
    assert open_storage(uri).read(record_key(0)) == record
    assert part_names(open_storage(uri)) == {first.file}


def test_record_of_a_part_that_was_swept_away_is_replaced(uri: str) -> None:
    storage = open_storage(uri)
    stalled = CommitLog(open_storage(uri), Stalled())
    stalled.open()
    part = write_part(stalled, 0)
    with storage.lease() as lease:
        log = CommitLog(storage, lease)
        log.open()  # removes that part
        mine = write_part(log, 0, attempt=2000)
        with pytest.raises(JobError, match="is not there for the driver"):
            stalled.commit(part)
        # Had it looked just before the sweep, it would have committed.
        open_store(uri).create(record_key(0), record_of(part))
        committed = log.commit(mine)
    assert rows_of(storage) == [0, 1, 2]
    assert part_names(storage) == {committed.file} == {mine.path.rpartition("/")[2]}


def record_of(result: ShardResult) -> bytes:
    """The record that a driver makes of a part."""
    record = asdict(result) | {"file": result.path.rpartition("/")[2]}
    return json.dumps({name: value for name, value in record.items() if name not in ("path", "seconds")}).encode()


@pytest.mark.parametrize("damage", ["remove", "cut", "torn"])
def test_damaged_commit_is_replaced_by_the_next_driver_and_only_then(uri: str, damage: str) -> None:
    storage, store = open_storage(uri), open_store(uri)
    with storage.lease() as lease:
        log = CommitLog(storage, lease)
        log.open()
        first = log.commit(write_part(log, 0))
    if damage == "torn":
        store.write(record_key(0), b"{")
    elif damage == "cut":
        store.write(first.file, b"short")
    else:
        store.remove([first.file])
    first_record = storage.read(record_key(0))
    with storage.lease() as lease:
        log = CommitLog(storage, lease)
        assert log.open() == {}
        assert storage.read(record_key(0)) == first_record, "left until there is a better one"
        slow = CommitLog(open_storage(uri), Stalled())
        assert slow.open() == {}
        late = write_part(slow, 0, attempt=3000)
        second = log.commit(write_part(log, 0, attempt=2000))
        assert slow.commit(late) == second, "the record that it found damaged is another now"
    assert part_names(storage) == {second.file}
    assert rows_of(storage) == [0, 1, 2]


def test_part_that_is_gone_or_changed_is_refused(uri: str) -> None:
    storage = open_storage(uri)
    with storage.lease() as lease:
        log = CommitLog(storage, lease)
        log.open()
        result = write_part(log, 0)
        name = result.path.rpartition("/")[2]
        open_store(uri).write(name, b"short")
        with pytest.raises(JobError, match="5 bytes, but its replica wrote"):
            log.commit(result)
        open_store(uri).remove([name])
        with pytest.raises(JobError, match="is not there for the driver"):
            log.commit(result)


def test_a_part_is_never_put_over_another(uri: str) -> None:
    storage = open_storage(uri)
    with storage.lease() as lease:
        log = CommitLog(storage, lease)
        write_part(log, 0, attempt=1, rows=3)
        with pytest.raises(JobError, match="is there already, with another content"):
            write_part(log, 0, attempt=1, rows=2)


def test_text_replaces_text_on_every_storage(uri: str, tmp_path: Path) -> None:
    for storage in (open_storage(uri), open_storage(tmp_path)):
        storage.write_text("report.html", "<p>first, longer</p>")
        storage.write_text("report.html", "<p>naïve</p>")
        assert storage.read("report.html") == "<p>naïve</p>".encode()
