"""The commit protocol: whatever the moment of a crash, a shard is either committed whole or not at all."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from actors.parts import PartWriter
from actors.records import failed_record, passthrough_names
from actors.rows import InputRow, RowFailure, ShardStats
from jobs import lease as lease_module
from jobs.commit import CommitLog, read_commits
from jobs.files import write_json
from jobs.lease import Lease
from pipeline.errors import ConfigError, JobError
from tests.jobs.crashing_commits import crash_at_each_step
from tests.jobs.parts import SCHEMA, write_part


def test_part_file_is_sorted_typed_and_described(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        log = CommitLog(tmp_path, lease)
        log.open()
        result = write_part(log, 2)
        log.commit(result)
    table = pq.read_table(tmp_path / "part-000002.parquet")
    assert table.schema.equals(SCHEMA)
    assert table["row_index"].to_pylist() == [6, 7, 8]
    assert table["seed"].to_pylist() == [-1, -1, -1]
    assert table["input_text"].to_pylist() == ["kept"] * 3
    assert dict(table["accepted_by_source"][0].as_py()) == {"context": 3}
    assert result.stats == ShardStats(
        rows=3,
        prompt_tokens=6,
        output_tokens=24,
        rounds=12,
        drafted=18,
        accepted=9,
        rounds_without_draft=3,
        accepted_by_source={"context": 9},
        samples_ok=3,
    )
    assert result.stats.tau == (24 - 3) / 12


def test_statistics_add_up_in_every_field() -> None:
    one = ShardStats(**{f.name: 1 for f in fields(ShardStats) if f.name not in ("accepted_by_source", "error_types")})
    one = replace(one, accepted_by_source={"context": 1, "live": 1}, error_types={"a": 1})
    other = replace(one, accepted_by_source={"context": 1, "draft": 1}, error_types={"b": 1})
    assert asdict(one + other) == {
        **{f.name: 2 for f in fields(ShardStats)},
        "accepted_by_source": {"context": 2, "live": 1, "draft": 1},
        "error_types": {"a": 1, "b": 1},
    }
    assert one.accepted_by_source == {"context": 1, "live": 1}
    assert ShardStats() + one == one + ShardStats() == one


def test_error_row_has_nulls_where_nothing_exists(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    writer = PartWriter(str(path), SCHEMA.serialize().to_pybytes())
    writer.add(failed_record(InputRow(4, "x"), 1, 9, RowFailure("malformed_json", "line 5")))
    writer.close()
    (row,) = pq.read_table(path).to_pylist()
    values = {name: value for name, value in row.items() if value is not None}
    assert values == {
        "row_index": 4,
        "id": "x",
        "sample": 1,
        "seed": 9,
        "status": "error",
        "error_type": "malformed_json",
        "error_message": "line 5",
    }


def test_clashing_columns_get_a_prefix_until_they_are_unique() -> None:
    names = passthrough_names(["text", "input_text", "mine", "seed"])
    assert names == {"text": "input_input_text", "input_text": "input_text", "mine": "mine", "seed": "input_seed"}


def test_unwritable_part_leaves_nothing_behind(tmp_path: Path) -> None:
    writer = PartWriter(str(tmp_path / "gone" / "part.parquet"), SCHEMA.serialize().to_pybytes())
    with pytest.raises(JobError, match=r"cannot write part file .*part\.parquet.*Free space"):
        writer.close()


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 100 bytes, which fails writes as a full disk does.

    Not a fixture: pytest reports a test while its fixtures stand, and its own output may be a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_is_an_error_and_leaves_no_half_file(tmp_path: Path) -> None:
    writer = PartWriter(str(tmp_path / "part.parquet"), SCHEMA.serialize().to_pybytes())
    message = r"cannot write part file .*File too large.*the same command then resumes"
    with pytest.raises(JobError, match=message), full_disk():
        writer.close()
    with pytest.raises(JobError, match=r"cannot write .*plan\.json.*the same command then resumes"), full_disk():
        write_json(tmp_path / "plan.json", {"long": "x" * 200})
    assert not (tmp_path / "part.parquet").exists()
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.chaos
def test_crash_before_any_step_of_a_commit_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Kill before each step in turn; the next driver finds shard 0 whole or absent, and can finish the job."""
    outcomes = set()
    num_steps = crash_at_each_step(str(tmp_path), "commit")
    for step in range(1, num_steps + 1):
        output = tmp_path / str(step)
        with Lease(output) as lease:
            log = CommitLog(output, lease)
            done = log.open()
            outcomes.add(len(done))
            parts = sorted(path.name for path in output.glob("part-*"))
            assert parts == ["part-000000.parquet"] * len(done)
            assert list((output / "_tmp").iterdir()) == []
            log.commit(write_part(log, 0, attempt=2))
            log.commit(write_part(log, 1, attempt=2))
            log.finish()
        table = pq.read_table([output / commit.file for commit, _ in read_commits(output) if commit])
        assert table["row_index"].to_pylist() == [0, 1, 2, 3, 4, 5]
        names = {path.name for path in output.iterdir()}
        assert names == {"_commits", "_lease.lock", "part-000000.parquet", "part-000001.parquet"}
    assert num_steps > 10
    assert outcomes == {0, 1}


def test_second_commit_of_a_shard_changes_nothing(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        log = CommitLog(tmp_path, lease)
        log.open()
        first = log.commit(write_part(log, 0, attempt=1))
        late = write_part(log, 0, attempt=2)
        assert log.commit(late) == first
        assert not Path(late.path).exists()


def test_debris_is_removed_and_strangers_are_kept(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        log = CommitLog(tmp_path, lease)
        log.open()
        log.commit(write_part(log, 0))
        write_part(log, 1)
        for name in ("part-000007.parquet", "part-mine.parquet", "notes.txt", "_commits/000001.json.77.tmp"):
            (tmp_path / name).write_text("x")
        assert set(CommitLog(tmp_path, lease).open()) == {0}
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"part-000000.parquet", "_commits/000000.json", "part-mine.parquet", "notes.txt", "_lease.lock"}


@pytest.mark.parametrize("damage", ["remove", "cut"])
def test_commit_whose_file_is_damaged_is_done_again(tmp_path: Path, damage: str) -> None:
    with Lease(tmp_path) as lease:
        log = CommitLog(tmp_path, lease)
        log.open()
        log.commit(write_part(log, 0))
        part = tmp_path / "part-000000.parquet"
        part.unlink() if damage == "remove" else part.write_bytes(part.read_bytes()[:-1])
        assert CommitLog(tmp_path, lease).open() == {}


def test_part_file_that_the_driver_cannot_see_or_that_changed_is_refused(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        log = CommitLog(tmp_path, lease)
        log.open()
        result = write_part(log, 0)
        Path(result.path).write_bytes(b"short")
        with pytest.raises(JobError, match="5 bytes, but its replica wrote"):
            log.commit(result)
        Path(result.path).unlink()
        with pytest.raises(JobError, match="not visible to the driver"):
            log.commit(result)


def test_live_driver_keeps_others_out_and_leaves_no_lease(tmp_path: Path) -> None:
    with Lease(tmp_path), pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "):
        Lease(tmp_path)
    assert not (tmp_path / "_lease").exists()
    with Lease(tmp_path):
        pass


def test_lease_of_a_killed_driver_is_taken_over_at_once(tmp_path: Path) -> None:
    script = "import os, sys, pathlib, jobs.lease as m; m.Lease(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60, check=False)
    assert (tmp_path / "_lease").exists()
    with Lease(tmp_path) as lease, lease.held():
        pass


def test_lease_of_another_host_is_taken_over_once_it_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "_lease"
    write_json(path, {"token": "t", "host": "elsewhere", "pid": 1, "started": "never"})
    with pytest.raises(ConfigError, match="in use by process 1 on elsewhere"):
        Lease(tmp_path)
    old = time.time() - lease_module.STALE_SECONDS - 1
    os.utime(path, (old, old))
    with Lease(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_driver_that_lost_its_lease_cannot_commit(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        log = CommitLog(tmp_path, lease)
        log.open()
        result = write_part(log, 0)
        write_json(tmp_path / "_lease", {"token": "another", "host": "elsewhere", "pid": 1})
        with pytest.raises(JobError, match="taken over by process 1 on elsewhere"):
            log.commit(result)
    assert not (tmp_path / "part-000000.parquet").exists()
    assert (tmp_path / "_lease").exists()


def test_heartbeat_keeps_the_lease_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    with Lease(tmp_path):
        path = tmp_path / "_lease"
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
