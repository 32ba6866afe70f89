"""The driver's loop on real Ray actors without a model: shards survive lost replicas, and nothing else is retried."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from actors.records import output_schema
from actors.rows import InputRow, ReplicaInfo, ShardStats
from jobs import seats
from jobs.backend import Launch, Retrieving
from jobs.cluster import Placement, place
from jobs.commit import Commit, CommitLog
from jobs.config import GenerateConfig
from jobs.driver import MAX_KILLS, Driver, DriverConfig
from jobs.lease import Lease
from pipeline.errors import ConfigError, JobError, ModelError
from tests.fakes import FakeReplica, Faults, fake_generation

SCHEMA = output_schema(["prompt"], pa.schema([]), logprobs=False)
ROWS_A_SHARD = 4


@pytest.fixture
def on_ray(cluster: str) -> Iterator[None]:
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@dataclass
class Listener:
    """A watcher that remembers, and may act on the n-th commit."""

    on_commit: Callable[[int], None] = lambda count: None
    stop_after: int = 10**9
    infos: list[ReplicaInfo] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    stats: ShardStats = field(default_factory=ShardStats)

    def started(self, info: ReplicaInfo) -> None:
        self.infos.append(info)

    def progressed(self, stats: ShardStats) -> None:
        self.stats = stats

    def committed(self, commit: Commit) -> None:
        self.commits.append(commit)
        self.on_commit(len(self.commits))

    def should_stop(self) -> bool:
        return len(self.commits) >= self.stop_after


def make_rows(num_shards: int) -> Iterator[tuple[int, tuple[InputRow, ...]]]:
    for shard in range(num_shards):
        indices = range(shard * ROWS_A_SHARD, (shard + 1) * ROWS_A_SHARD)
        yield shard, tuple(InputRow(i, str(i), prompt=f"prompt {i}") for i in indices)


def drive(
    output: Path,
    faults: Faults,
    listener: Listener,
    *,
    num_shards: int = 8,
    num_replicas: int = 2,
    fingerprint: Mapping[str, Any] | None = None,
) -> Driver:
    """Run the driver; with a fingerprint it keeps progress."""
    config = GenerateConfig(model="fake", prompts=("unused",), output=str(output))
    placement = Placement(num_replicas, num_cpus=1.0, num_gpus=0.0, num_threads=1)

    def launch(replica: int) -> Any:
        order = Launch(config, placement, Retrieving("plain", frozenset()), None, {}, replica, concurrency=4)
        return order.actor(FakeReplica, config, replica, "float32", faults)

    with Lease(output) as lease:
        log = CommitLog(output, lease)
        done = log.open()
        if fingerprint is not None:
            log.keep_progress(fingerprint)
        shards = (item for item in make_rows(num_shards) if item[0] not in done)
        driver_config = DriverConfig(num_replicas, in_flight=2, run=1, schema=SCHEMA.serialize().to_pybytes())
        driver = Driver(shards, log, launch, listener, driver_config)
        driver.run()
    return driver


def assert_complete(output: Path, num_shards: int = 8) -> None:
    table = pq.read_table(sorted(output.glob("part-*.parquet")))
    assert table["row_index"].to_pylist() == list(range(num_shards * ROWS_A_SHARD))
    assert set(table["status"].to_pylist()) == {"ok"}
    seedless = [fake_generation(f"prompt {i}", 0).num_prompt_tokens for i in range(num_shards * ROWS_A_SHARD)]
    assert table["num_prompt_tokens"].to_pylist() == seedless


@pytest.mark.usefixtures("on_ray")
def test_every_shard_is_committed_once_and_counted(tmp_path: Path) -> None:
    listener = Listener()
    driver = drive(tmp_path, Faults(), listener)
    assert_complete(tmp_path)
    assert sorted(commit.shard for commit in listener.commits) == list(range(8))
    assert {info.replica for info in listener.infos} == {0, 1}
    assert driver.stats.rows == 8 * ROWS_A_SHARD


@pytest.mark.chaos
@pytest.mark.usefixtures("on_ray")
def test_killed_replica_is_replaced_and_its_shards_are_done_again(tmp_path: Path) -> None:
    listener = Listener()
    killed: set[int] = set()

    def kill_one(count: int) -> None:
        if count in (2, 5):
            killed.add(next(info.pid for info in reversed(listener.infos) if info.pid not in killed))
            for pid in killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    listener.on_commit = kill_one
    drive(tmp_path, Faults(seconds_a_row=0.05), listener)
    assert_complete(tmp_path)
    assert len(listener.infos) >= 3
    assert len(listener.commits) == 8


@pytest.mark.chaos
@pytest.mark.usefixtures("on_ray")
def test_row_that_kills_twice_and_then_not_is_generated(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    output = tmp_path / "out"
    output.mkdir()
    faults = Faults(deadly_prompt="prompt 9", deaths=2, marks=str(marks))
    drive(output, faults, Listener())
    assert_complete(output)


@pytest.mark.chaos
@pytest.mark.usefixtures("on_ray")
@pytest.mark.parametrize("deadly", [8, 9, 11])
def test_a_row_that_ends_every_replica_becomes_an_error_row(tmp_path: Path, deadly: int) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    output = tmp_path / "out"
    output.mkdir()
    driver = drive(output, Faults(deadly_prompt=f"prompt {deadly}", marks=str(marks)), Listener())
    table = pq.read_table(sorted(output.glob("part-*.parquet")))
    assert table["row_index"].to_pylist() == list(range(8 * ROWS_A_SHARD))
    failed = [row for row in table.to_pylist() if row["status"] != "ok"]
    assert [(row["row_index"], row["error_type"]) for row in failed] == [(deadly, "killed_replica")]
    assert len(list(marks.iterdir())) <= MAX_KILLS + 3, "one of 4 rows: two halvings, and the row alone"
    assert driver.stats.rows >= 8 * ROWS_A_SHARD
    tried = list((output / "_tmp").glob(f"{deadly // ROWS_A_SHARD:06d}.*.parquet"))
    assert not tried, "what a search has tried does not stay; what a lost replica had just written goes with the job"


@pytest.mark.chaos
@pytest.mark.usefixtures("on_ray")
def test_a_shard_that_ends_replicas_only_as_a_whole_fails_the_job_and_is_named(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(
        JobError, match=r"5 replicas were lost while they had shard 2, rows 8 to 11 \(ids '8' to '11'\)"
    ):
        drive(output, Faults(deadly_prompt="prompt 9", deadly_rows=ROWS_A_SHARD, marks=str(marks)), Listener())


@pytest.mark.usefixtures("on_ray")
def test_replicas_that_cannot_live_fail_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "MAX_DEATHS", 1)
    listener = Listener()
    listener.started = lambda info: os.kill(info.pid, signal.SIGKILL)  # type: ignore[method-assign]
    with pytest.raises(JobError, match="every replica was lost again and again"):
        drive(tmp_path, Faults(seconds_a_row=0.2), listener, num_replicas=1)


@pytest.mark.usefixtures("on_ray")
def test_what_a_replica_raises_ends_the_job_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^no such model$"):
        drive(tmp_path, Faults(start_error="no such model"), Listener())


@pytest.mark.usefixtures("on_ray")
def test_stopping_keeps_what_is_committed(tmp_path: Path) -> None:
    drive(tmp_path, Faults(seconds_a_row=0.05), Listener(stop_after=2))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("part-*.parquet")}
    assert 2 <= len(before) < 8
    drive(tmp_path, Faults(), Listener())
    assert_complete(tmp_path)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def config_with(**options: Any) -> GenerateConfig:
    return GenerateConfig(model="m", prompts=("p",), output="o", **options)


@pytest.mark.parametrize(
    ("options", "nodes", "wanted"),
    [
        ({}, [{"CPU": 8.0}], Placement(1, 8.0, 0.0, 8)),
        ({}, [{"CPU": 8.0}, {"CPU": 4.0}, {"GPU": 0.0}], Placement(2, 4.0, 0.0, 4)),
        ({"num_replicas": 3}, [{"CPU": 8.0}], Placement(3, 2.0, 0.0, 2)),
        ({"num_replicas": 3}, [{"CPU": 2.0}], Placement(3, 0.6666, 0.0, 1)),
        ({"num_threads": 2}, [{"CPU": 8.0}], Placement(1, 2.0, 0.0, 2)),
        ({}, [{"CPU": 8.0, "GPU": 4.0}], Placement(4, 1.0, 1.0, 2)),
        ({"gpus_per_replica": 0.5}, [{"CPU": 8.0, "GPU": 2.0}], Placement(4, 1.0, 0.5, 2)),
        ({"device": "cpu"}, [{"CPU": 8.0, "GPU": 4.0}], Placement(1, 8.0, 0.0, 8)),
    ],
)
def test_placement_divides_the_cluster(
    options: dict[str, Any], nodes: list[dict[str, float]], wanted: Placement
) -> None:
    assert place(config_with(**options), nodes) == wanted


@pytest.mark.parametrize(
    ("options", "nodes", "message"),
    [
        ({"device": "cuda"}, [{"CPU": 8.0}], "--device is cuda, but replicas get no GPU"),
        ({"gpus_per_replica": 2.0}, [{"CPU": 8.0, "GPU": 1.0}], "--gpus-per-replica is 2, but the largest node has 1"),
        ({"gpus_per_replica": 1.5}, [{"CPU": 8.0, "GPU": 4.0}], "above 1 it must be a whole number"),
        ({}, [{"GPU": 1.0}], "no CPUs"),
    ],
)
def test_impossible_placement_is_refused(options: dict[str, Any], nodes: list[dict[str, float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(config_with(**options), nodes)
