"""A seat: the place of one replica, in which Ray actors come and go.

Turns futures into events, and knows which exceptions mean that an actor or its node is lost (to be replaced)
and which mean that the work itself failed (never repeated).
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.rows import InputRow, ReplicaInfo, ShardResult, ShardStats, ShardTask
from jobs.runtime import Runtime
from jobs.suspects import Search
from pipeline.errors import JobError, RasdError

LOST = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    OutOfMemoryError,
    ObjectLostError,
    RaySystemError,
    LocalRayletDiedError,
)
MAX_DEATHS = 5
MAX_BACKOFF_SECONDS = 60.0
STOP_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Work:
    """A shard that waits for a replica.

    Attributes:
        tries: how often it was sent to one before.
        kills: how many replicas were lost while they had it.
        search: for the row that ends them, of which `rows` are the next try; None while all rows are to be done.
        searches: how many have found nothing.
    """

    shard: int
    rows: tuple[InputRow, ...]
    tries: int = 0
    kills: int = 0
    search: Search | None = None
    searches: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """The seat's replica has loaded its model."""

    info: ReplicaInfo


@dataclass(frozen=True, slots=True)
class Finished:
    """A shard's part file is ready to be committed; that of a search only shows that its rows did no harm."""

    work: Work
    result: ShardResult


@dataclass(frozen=True, slots=True)
class Lost:
    """The seat's actor is gone, and with it the work it had.

    Attributes:
        is_preemption: the node was taken away, so that the work is not to blame.
    """

    work: tuple[Work, ...]
    is_preemption: bool


Event = Started | Finished | Lost


class Seat:
    """One replica for the length of a job.

    Args:
        replica: its ordinal.
        launch: makes an actor for that ordinal; called again after each loss.
        runtime: where actors run.
        poll_seconds: between two questions for its progress.
    """

    def __init__(self, replica: int, launch: Callable[[int], Any], runtime: Runtime, poll_seconds: float) -> None:
        self.replica = replica
        self.working: dict[Any, Work] = {}
        self.is_ready = False
        self._launch = launch
        self._runtime = runtime
        self._poll_seconds = poll_seconds
        self._actor: Any = None
        self._starting: Any = None
        self._polling: Any = None
        self._stopping: Any = None
        self._deaths = 0
        self._launch_at = 0.0
        self._poll_at = 0.0
        self._live = ShardStats()
        self._settled = ShardStats()
        self._earlier = ShardStats()

    @property
    def is_retired(self) -> bool:
        """Its actors died so often in a row that no other is tried."""
        return self._deaths > MAX_DEATHS

    @property
    def stats(self) -> ShardStats:
        """What this seat has committed, and rows that its actor has finished since."""
        newest = self._live if self._live.rows > self._settled.rows else self._settled
        return self._earlier + newest

    def launch_if_due(self, now: float) -> None:
        """Start an actor unless there is one, or it is too soon after a loss."""
        if self._actor is None and not self.is_retired and now >= self._launch_at:
            self._actor = self._launch(self.replica)
            self._starting = self._actor.start.remote()

    def assign(self, work: Work, task: ShardTask) -> None:
        """Send a shard to the replica, which must be ready."""
        self.working[self._actor.run_shard.remote(task)] = work

    def poll(self, now: float) -> None:
        """Ask for progress, not too often; the answer arrives with `futures`."""
        if self.is_ready and self._polling is None and now >= self._poll_at:
            self._poll_at = now + self._poll_seconds
            self._polling = self._actor.progress.remote()

    def futures(self) -> list[Any]:
        """Everything that this seat waits for."""
        return [future for future in (self._starting, self._polling, *self.working) if future is not None]

    def settle(self, future: Any) -> Iterator[Event]:
        """Events of one of its futures that is done; none if the future belongs to an actor lost meanwhile.

        Raises:
            RasdError: what the replica raised.
            JobError: the replica failed in a way that is not Ray's.
        """
        if future not in self.futures():
            return
        try:
            value = self._runtime.get(future)
        except RayTaskError as error:
            raise _reason(error, self.replica) from error
        except LOST as error:
            if getattr(error, "actor_init_failed", False):
                raise _unrunnable(error) from error
            yield self._lose(error)
            return
        except RayError as error:
            raise _unrunnable(error) from error
        if future is self._starting:
            self._starting, self.is_ready = None, True
            yield Started(value)
        elif future is self._polling:
            self._polling, self._live = None, value
        else:
            work = self.working.pop(future)
            self._deaths = 0
            if work.search is None:
                self._settled += value.stats
            yield Finished(work, value)

    def ask_to_stop(self) -> Any:
        """Let an idle replica tidy up; `stop` takes its answer. Several are asked before the first is waited for.

        Returns:
            What to wait for; None of a replica that has nothing to tidy up.
        """
        if self.is_ready and not self.working:
            self._stopping = self._actor.stop.remote()
        return self._stopping

    def stop(self, until: float) -> list[dict[str, Any]]:
        """End the replica; the events of its rounds, if they are traced and it answers until then."""
        if self._actor is None:
            return []
        events: list[dict[str, Any]] = []
        if self._stopping is not None:
            try:
                events = self._runtime.get(self._stopping, timeout=max(0.0, until - self._runtime.now())) or []
            except RayError as error:
                log.warning("replica %d did not stop in time: %s", self.replica, _first_line(error))
        self._runtime.kill(self._actor)
        self._actor = self._stopping = None
        return events

    def _lose(self, error: Exception) -> Lost:
        self._runtime.kill(self._actor)
        lost = Lost(tuple(self.working.values()), bool(getattr(error, "preempted", False)))
        if all(work.search is None for work in lost.work):  # who searches for a deadly row expects to lose replicas
            self._deaths += 1
        delay = min(MAX_BACKOFF_SECONDS, 2.0 ** (self._deaths - 1)) if self._deaths > 1 else 0.0
        self._launch_at = self._runtime.now() + delay
        log.warning(
            "replica %d is lost (%s); %s",
            *(self.replica, _first_line(error), self._outlook(delay)),
            extra={"replica": self.replica, "shards": [work.shard for work in lost.work]},
        )
        self._actor = self._starting = self._polling = None
        self.working, self.is_ready = {}, False
        self._earlier, self._live, self._settled = self._earlier + self._settled, ShardStats(), ShardStats()
        return lost

    def _outlook(self, delay: float) -> str:
        if self.is_retired:
            return f"it was lost {self._deaths} times in a row and is not started again"
        return f"its {len(self.working)} shards go back, another starts in {delay:.0f} s"


def _reason(error: RayTaskError, replica: int) -> RasdError:
    cause = error.cause
    if isinstance(cause, RasdError):
        return cause
    return JobError(
        f"replica {replica} failed: {type(cause).__name__}: {cause}. This is a bug; what is committed stays."
    )


def _unrunnable(error: RayError) -> JobError:
    return JobError(f"Ray cannot run a replica: {error}. Check that every node has this project and its dependencies.")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first line of Ray's text only says that an actor died; the last one says why.
    return lines[-1].partition(" Some common causes")[0][:200] if lines else type(error).__name__
