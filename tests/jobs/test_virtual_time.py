"""The driver under virtual time: every shard once, whatever is lost, and the same twice; hours within a second."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.records import output_schema
from actors.rows import InputRow, ReplicaInfo, ShardStats, ShardTask
from benchmarks.virtual_time import Costs, VirtualActor, VirtualTime
from jobs.commit import Commit, CommitLog
from jobs.config import GenerateConfig
from jobs.driver import ATTEMPTS_A_RUN, MAX_KILLS, Driver, DriverConfig
from jobs.lease import Lease
from jobs.seats import MAX_DEATHS, STOP_SECONDS
from pipeline.errors import JobError
from tests.fakes import FakeReplica, Faults

SCHEMA = output_schema(["prompt"], pa.schema([]), logprobs=False)
ROWS_A_SHARD = 4
NUM_SHARDS = 24
SECONDS = 60.0

Making = Callable[[VirtualTime, Any, int], VirtualActor]


@dataclass
class Diary:
    """A watcher that notes what happened when."""

    time: VirtualTime = field(compare=False)
    starts: list[float] = field(default_factory=list)
    commits: list[tuple[float, int, int]] = field(default_factory=list)
    stats: ShardStats = field(default_factory=ShardStats)
    stop_at: float = math.inf

    def started(self, info: ReplicaInfo) -> None:
        self.starts.append(self.time.now())

    def progressed(self, stats: ShardStats) -> None:
        self.stats = stats

    def committed(self, commit: Commit) -> None:
        self.commits.append((self.time.now(), commit.shard, commit.attempt))

    def should_stop(self) -> bool:
        return self.time.now() >= self.stop_at


def steady(time: VirtualTime, plain: Any, launched: int) -> VirtualActor:
    return VirtualActor(time, plain, lambda task: SECONDS)


def make_rows() -> Iterator[tuple[int, tuple[InputRow, ...]]]:
    for shard in range(NUM_SHARDS):
        indices = range(shard * ROWS_A_SHARD, (shard + 1) * ROWS_A_SHARD)
        yield shard, tuple(InputRow(i, str(i), prompt=f"prompt {i}") for i in indices)


def drive(
    output: Path,
    make: Making = steady,
    *,
    num_replicas: int = 3,
    time: VirtualTime | None = None,
    stop_at: float = math.inf,
    run: int = 1,
    released: list[int] | None = None,
) -> Diary:
    """Run the driver on actors made by `make`, which is told how many there were before."""
    time = time or VirtualTime()
    diary = Diary(time, stop_at=stop_at)
    config = GenerateConfig(model="fake", prompts=("unused",), output=str(output))
    launched: list[int] = []

    def launch(replica: int) -> VirtualActor:
        launched.append(replica)
        return make(time, FakeReplica(config, replica, "float32", Faults()), len(launched) - 1)

    output.mkdir(exist_ok=True)
    with Lease(output) as lease:
        log = CommitLog(output, lease)
        done = log.open()
        shards = (item for item in make_rows() if item[0] not in done)
        settings = DriverConfig(num_replicas, in_flight=2, run=run, schema=SCHEMA.serialize().to_pybytes())
        Driver(shards, log, launch, diary, settings, time, [].append if released is None else released.append).run()
    return diary


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(sorted(output.glob("part-*.parquet"))).to_pylist()
    assert [row["row_index"] for row in rows] == list(range(NUM_SHARDS * ROWS_A_SHARD))
    return rows


def test_every_shard_is_committed_once_at_the_time_that_arithmetic_gives(tmp_path: Path) -> None:
    diary = drive(tmp_path)
    assert {row["status"] for row in rows_of(tmp_path)} == {"ok"}
    assert sorted(shard for _, shard, _ in diary.commits) == list(range(NUM_SHARDS))
    assert [at for at, _, _ in diary.commits] == [SECONDS * (1 + i // 3) for i in range(NUM_SHARDS)]
    assert diary.stats.rows == NUM_SHARDS * ROWS_A_SHARD


def mortal(time: VirtualTime, plain: Any, launched: int) -> VirtualActor:
    """The first three actors die one after the other, two of them with shards under way."""
    dies_at = (90.0, 150.0, 0.5)[launched] if launched < 3 else math.inf
    return VirtualActor(time, plain, lambda task: SECONDS + task.shard, load_seconds=1.0, dies_at=dies_at)


def test_shards_of_lost_replicas_are_done_again_and_committed_once(tmp_path: Path) -> None:
    diary = drive(tmp_path, mortal)
    assert {row["status"] for row in rows_of(tmp_path)} == {"ok"}
    assert sorted(shard for _, shard, _ in diary.commits) == list(range(NUM_SHARDS))
    assert len(diary.starts) == 5, "two of the first three became ready, and all were replaced"
    again = {shard for _, shard, attempt in diary.commits if attempt > ATTEMPTS_A_RUN}
    assert len(again) == 4, "two replicas had two shards each when they died"
    assert not list((tmp_path / "_tmp").iterdir())


def test_the_place_of_a_replica_that_never_loads_is_given_up(tmp_path: Path) -> None:
    """Others may be waiting for it; once it was kept to the end, and they waited as long."""

    def first_never_loads(time: VirtualTime, plain: Any, launched: int) -> VirtualActor:
        dies_at = time.now() + 0.5 if plain.start().replica == 0 else math.inf
        return VirtualActor(time, plain, lambda task: SECONDS, load_seconds=1.0, dies_at=dies_at)

    released: list[int] = []
    diary = drive(tmp_path, first_never_loads, released=released)
    assert released == [0]
    assert sorted(shard for _, shard, _ in diary.commits) == list(range(NUM_SHARDS))


def test_two_runs_are_the_same_in_every_time_and_place(tmp_path: Path) -> None:
    assert drive(tmp_path / "a", mortal) == drive(tmp_path / "b", mortal)
    files = [sorted((tmp_path / name).glob("part-*.parquet")) for name in "ab"]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_a_row_that_ends_every_replica_becomes_an_error_row(tmp_path: Path) -> None:
    def is_deadly(task: ShardTask) -> bool:
        return any(row.row_index == 17 and row.error is None for row in task.rows)

    diary = drive(tmp_path, lambda time, plain, _: VirtualActor(time, plain, lambda task: SECONDS, is_deadly=is_deadly))
    failed = [row for row in rows_of(tmp_path) if row["status"] != "ok"]
    assert [(row["row_index"], row["error_type"]) for row in failed] == [(17, "killed_replica")]
    assert len(diary.starts) <= 3 + MAX_KILLS + 3, "three to suspect the shard, two halvings, and the row alone"


def test_replicas_that_always_die_are_given_up_after_a_known_time(tmp_path: Path) -> None:
    time = VirtualTime()
    with pytest.raises(JobError, match="every replica was lost again and again"):
        drive(
            tmp_path,
            lambda time, plain, _: VirtualActor(
                time, plain, lambda task: 1.0, load_seconds=5.0, dies_at=time.now() + 4
            ),
            num_replicas=1,
            time=time,
        )
    waits = sum(2.0**i for i in range(1, MAX_DEATHS))
    assert time.now() == (MAX_DEATHS + 1) * 4 + waits, "at once the first time, then after 2, 4, 8, ... seconds"


def test_a_stopped_job_resumes_with_what_is_left(tmp_path: Path) -> None:
    first = drive(tmp_path, stop_at=200.0)
    assert len(first.commits) == 9
    second = drive(tmp_path, run=2)
    both = sorted(shard for _, shard, _ in first.commits + second.commits)
    assert both == list(range(NUM_SHARDS))
    rows_of(tmp_path)


@pytest.mark.parametrize("num_replicas", [NUM_SHARDS, NUM_SHARDS - 8])
def test_no_replica_has_two_shards_while_another_has_none(tmp_path: Path, num_replicas: int) -> None:
    """Replicas were filled one by one once: half of 24 replicas took all of 24 shards, and the others idled."""
    diary = drive(tmp_path, num_replicas=num_replicas)
    assert sum(at == SECONDS for at, _, _ in diary.commits) == num_replicas


def test_replicas_that_do_not_stop_are_waited_for_together(tmp_path: Path) -> None:
    """Each had its own five seconds once: 512 replicas that hang would have held a finished job for 43 minutes."""
    time = VirtualTime()
    make = partial(VirtualActor, seconds=lambda task: SECONDS, stop_seconds=60.0)
    diary = drive(tmp_path, lambda time, plain, _: make(time, plain), num_replicas=NUM_SHARDS, time=time)
    assert time.now() == diary.commits[-1][0] + STOP_SECONDS


def test_many_replicas_are_asked_for_progress_more_rarely(tmp_path: Path) -> None:
    """So that what the driver spends on it does not grow with them."""
    few, many = VirtualTime(), VirtualTime()
    drive(tmp_path / "few", num_replicas=1, time=few)
    drive(tmp_path / "many", num_replicas=640, time=many)
    polls = few.events - NUM_SHARDS - 1 - 1, many.events - NUM_SHARDS - 640 - 640
    assert polls[0] == pytest.approx(NUM_SHARDS * SECONDS, rel=0.05), "about one a second"
    assert polls[1] <= 640 * (SECONDS / 10 + 1), "not one a second each"


def test_what_the_driver_takes_is_on_the_clock(tmp_path: Path) -> None:
    """A driver that needs a second for each look keeps replicas waiting; one that needs none does not."""
    ticks = iter(range(10**9))
    slow = VirtualTime(meter=lambda: next(ticks) * 0.01, costs=Costs(submit=0.5, wait=1.0))
    diary = drive(tmp_path / "slow", time=slow)
    assert slow.busy > slow.calls > NUM_SHARDS * 0.5
    assert diary.commits[-1][0] > drive(tmp_path / "free").commits[-1][0]
