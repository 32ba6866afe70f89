"""A replica without a model: takes a known time a shard and writes real part files, for benchmarks of the driver."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.rows import ShardResult, ShardTask
from jobs.config import GenerateConfig
from tests.fakes import FakeReplica, Faults


class TimedReplica(FakeReplica):
    """Sleeps through one shard after another, as slots that are full work through them.

    Args:
        seconds: how long each shard takes, by its ordinal; not counting its part file, which is written beside the
            next shard.
    """

    def __init__(self, config: GenerateConfig, replica: int, dtype: str, seconds: Callable[[int], float]) -> None:
        super().__init__(config, replica, dtype, Faults())
        self._seconds = seconds
        self._slots = threading.Lock()
        self._spans: list[dict[str, Any]] = []

    def run_shard(self, task: ShardTask) -> ShardResult:
        """See `actors.replica.Replica.run_shard`."""
        with self._slots:
            begin = time.monotonic()
            time.sleep(self._seconds(task.shard))
            self._spans.append({"name": "shard", "shard": task.shard, "begin": begin, "end": time.monotonic()})
        return super().run_shard(task)

    def stop(self) -> list[dict[str, Any]]:
        """When it was busy, by the monotonic clock that all processes of a machine share."""
        return self._spans


class NotingReplica(TimedReplica):
    """Leaves a file `note` with the time at which the first shard arrived, in seconds since the epoch."""

    def __init__(self, note: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._note = Path(note)

    def run_shard(self, task: ShardTask) -> ShardResult:
        """See `TimedReplica`."""
        if not self._note.exists():
            self._note.write_text(str(time.time()))
        return super().run_shard(task)


@dataclass(frozen=True, slots=True)
class SteadySeconds:
    """The same seconds for every shard."""

    seconds: float

    def __call__(self, shard: int) -> float:
        return self.seconds


class SkewedSeconds:
    """Seconds of each shard, a few much longer than most: 30 to 120 times `scale`, 56 on average."""

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        self._seed = seed
        self._scale = scale

    def __call__(self, shard: int) -> float:
        share = random.Random(f"{self._seed} {shard}").betavariate(1.2, 3.0)
        return self._scale * (30.0 + 90.0 * share)
