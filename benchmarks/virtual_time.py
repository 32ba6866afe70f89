"""The driver's runtime under virtual time: replicas without a model, whose calls end at times known in advance.

Waiting jumps to the next end of a call, so that hours of a large cluster pass in seconds. What the driver itself takes
is not jumped over: its own seconds between two calls into this runtime are charged to the virtual clock, and so
is what Ray's calls were measured to take. What the replicas do in this process (their part files) is not charged.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorDiedError, GetTimeoutError

from actors.rows import ShardTask


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of the driver that Ray's calls take.

    Attributes:
        submit: one call of an actor's method; submit_row: more for each input row it carries.
        get: of one result.
        wait: a look at futures; wait_future: more for each of them.
    """

    submit: float = 0.0
    submit_row: float = 0.0
    get: float = 0.0
    wait: float = 0.0
    wait_future: float = 0.0


class Future:
    """A call that ends at `at`, with what `answer` then returns or raises."""

    __slots__ = ("answer", "at")

    def __init__(self, at: float, answer: Callable[[], Any]) -> None:
        self.at = at
        self.answer = answer


class VirtualTime:
    """See `jobs.runtime.Runtime`.

    Attributes:
        busy: seconds charged so far: the driver's own and those of Ray's calls.
        calls: seconds of these that Ray's calls were charged.
        events: results fetched.

    Args:
        meter: the driver's own seconds so far, such as `time.perf_counter` (what it waits for the disk included) or
            `time.thread_time`; by default it takes none, and everything is deterministic.
    """

    def __init__(self, meter: Callable[[], float] = lambda: 0.0, costs: Costs | None = None) -> None:
        self.costs = costs or Costs()
        self.busy = 0.0
        self.calls = 0.0
        self.events = 0
        self._now = 0.0
        self._meter = meter
        self._mark = meter()
        self._is_outside = False

    def driver_seconds(self) -> float:
        """Seconds charged, up to this moment: a timer for profiles of the driver alone."""
        return self.busy + (0.0 if self._is_outside else self._meter() - self._mark)

    @contextlib.contextmanager
    def outside(self, cost: float = 0.0) -> Iterator[float]:
        """A section that is not the driver's, from the time it gives; what the driver did before is charged first."""
        seconds = self._meter() - self._mark + cost
        self._now += seconds
        self.busy += seconds
        self.calls += cost
        self._is_outside = True
        try:
            yield self._now
        finally:
            self._mark = self._meter()
            self._is_outside = False

    def now(self) -> float:
        """See `Runtime.now`."""
        with self.outside() as now:
            return now

    def sleep(self, seconds: float) -> None:
        """See `Runtime.sleep`."""
        with self.outside():
            self._now += seconds

    def wait(self, futures: Sequence[Future], timeout: float) -> list[Future]:
        """See `Runtime.wait`."""
        with self.outside(self.costs.wait + len(futures) * self.costs.wait_future):
            first = min(future.at for future in futures)
            self._now = max(self._now, min(first, self._now + timeout))
            return [future for future in futures if future.at <= self._now]

    def get(self, future: Future, timeout: float | None = None) -> Any:
        """See `Runtime.get`."""
        with self.outside(self.costs.get):
            if timeout is not None and future.at > self._now + timeout:
                self._now += timeout
                raise GetTimeoutError(f"no answer within {timeout} s")
            self._now = max(self._now, future.at)
            self.events += 1
            return future.answer()

    def kill(self, actor: "VirtualActor") -> None:
        """See `Runtime.kill`."""
        with self.outside() as now:
            actor.die(now)

    def free(self) -> Mapping[str, float]:
        """See `Runtime.free`."""
        return {}


class VirtualActor:
    """A replica that works on one shard after another, as slots that are full do, each for a known time.

    A shard's part file is written when its result is fetched, at no time.

    Args:
        plain: has the methods of `actors.replica.Replica`, which here take no time.
        seconds: how long a shard takes.
        load_seconds: how long `start` takes; stop_seconds: how long `stop` does.
        dies_at: when its process ends by itself.
        is_deadly: whether a shard ends the process, halfway through it.
    """

    def __init__(
        self,
        time: VirtualTime,
        plain: Any,
        seconds: Callable[[ShardTask], float],
        *,
        load_seconds: float = 0.0,
        stop_seconds: float = 0.0,
        dies_at: float = math.inf,
        is_deadly: Callable[[ShardTask], bool] = lambda task: False,
    ) -> None:
        self._time = time
        self._plain = plain
        self._seconds = seconds
        self._dies_at = dies_at
        self._is_deadly = is_deadly
        self._free_at = 0.0
        self._open: list[Future] = []
        self._spans: list[dict[str, Any]] = []
        self.start = _Method(lambda: self._call(load_seconds, plain.start))
        self.progress = _Method(lambda: self._call(0.0, plain.progress))
        self.stop = _Method(lambda: self._call(stop_seconds, lambda: self._spans))
        self.run_shard = _Method(self._run_shard)

    def die(self, at: float) -> None:
        """End the process: what would have ended later fails then."""
        self._dies_at = min(self._dies_at, at)
        for future in self._open:
            if future.at > self._dies_at:
                future.at, future.answer = self._dies_at, _lost

    def _run_shard(self, task: ShardTask) -> Future:
        costs = self._time.costs
        with self._time.outside(costs.submit + len(task.rows) * costs.submit_row) as now:
            begin = max(now, self._free_at)
            self._free_at = end = begin + self._seconds(task)
            future = self._future(now, end, lambda: self._plain.run_shard(task))
            if end <= self._dies_at and self._is_deadly(task):
                self.die((begin + end) / 2)
            else:
                self._spans.append({"shard": task.shard, "begin": begin, "end": end})
        return future

    def _call(self, seconds: float, answer: Callable[[], Any]) -> Future:
        with self._time.outside(self._time.costs.submit) as now:
            return self._future(now, now + seconds, answer)

    def _future(self, now: float, end: float, answer: Callable[[], Any]) -> Future:
        if end > self._dies_at:
            return Future(max(self._dies_at, now), _lost)
        future = Future(end, answer)
        self._open = [other for other in self._open if other.at > now]
        self._open.append(future)
        return future


class _Method:
    """Called as the methods of Ray's actors are."""

    def __init__(self, call: Callable[..., Future]) -> None:
        self.remote = call


def _lost() -> Any:
    raise ActorDiedError()
