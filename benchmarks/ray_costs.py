"""What Ray's calls take of the driver's time on this machine; charged to the virtual clock."""

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from actors.rows import InputRow, ShardResult, ShardStats, ShardTask
from benchmarks.virtual_time import Costs
from jobs.runtime import RAY

_NUM_PENDING = 1500
_NUM_CALLS = 300
_NUM_LOOKS = 50


class _Sink:
    """Takes shards at once, or waits for ever."""

    def run_shard(self, task: ShardTask) -> ShardResult:
        """An answer of the usual size."""
        return ShardResult(task.shard, 0, task.part_path, 0, 0, "0" * 64, ShardStats(), 0.0)

    def hold(self) -> None:
        """Never answers."""
        threading.Event().wait()


def ray_costs(num_rows: int) -> Costs:
    """Measured on actors of the cluster that this process is connected to.

    Args:
        num_rows: of a shard, for what a row adds to a call.
    """
    actors: list[Any] = [ray.remote(_Sink).options(num_cpus=0).remote() for _ in range(2)]
    ray.get([actor.run_shard.remote(_task(1)) for actor in actors])
    results: list[Any] = []
    small = _median(lambda: results.append(actors[0].run_shard.remote(_task(1))), _NUM_CALLS)
    large = _median(lambda: results.append(actors[0].run_shard.remote(_task(num_rows))), _NUM_CALLS)
    ray.wait(results, num_returns=len(results))
    fetched = iter(results)
    get = _median(lambda: RAY.get(next(fetched)), len(results))
    done = results[:1]
    held = [actors[1].hold.remote() for _ in range(_NUM_PENDING)]
    few = _median(lambda: RAY.wait(done + held[:2], 0.0), _NUM_LOOKS)
    many = _median(lambda: RAY.wait(done + held, 0.0), _NUM_LOOKS)
    for actor in actors:
        ray.kill(actor)
    return Costs(
        submit=small,
        submit_row=max(0.0, (large - small) / (num_rows - 1)),
        get=get,
        wait=few,
        wait_future=(many - few) / _NUM_PENDING,
    )


def _task(num_rows: int) -> ShardTask:
    rows = tuple(
        InputRow(i, f"row-{i}", prompt=f"{i} " * 30, extra={"topic": "x", "score": 0.5}) for i in range(num_rows)
    )
    return ShardTask(0, 0, rows, "part", b"schema" * 500)


def _median(call: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
