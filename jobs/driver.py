"""The driver's loop: shards out to replicas, part files in, commits; replaces replicas that are lost.

Knows nothing of models, options or how rows are read.
"""

import heapq
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from actors.rows import InputRow, ReplicaInfo, ShardStats, ShardTask
from jobs.commit import Commit, CommitLog
from jobs.runtime import RAY, Runtime
from jobs.seats import STOP_SECONDS, Event, Finished, Lost, Seat, Started, Work
from jobs.suspects import Search
from pipeline.errors import JobError

MAX_KILLS = 3
MAX_SEARCHES = 2  # for a shard's deadly row, without finding one
# Attempts of different runs of the driver must differ: a replica of a dead run may still be writing.
ATTEMPTS_A_RUN = 1000
_TICK_SECONDS = 0.5
_POLL_SECONDS = 1.0
# Of all replicas together: progress is worth a small share of the driver's time, however many they are.
_POLLS_A_SECOND = 64
_WAITING_SECONDS = 30.0

log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Who is told what happens; may raise to end the job."""

    def started(self, info: ReplicaInfo) -> None:
        """A replica is ready."""

    def progressed(self, stats: ShardStats) -> None:
        """Totals of this run, often."""

    def committed(self, commit: Commit) -> None:
        """A shard is done for good."""

    def should_stop(self) -> bool:
        """Whether to take no more shards and return."""


@dataclass(frozen=True, slots=True)
class DriverConfig:
    """How the work is spread.

    Attributes:
        in_flight: most shards a replica has at a time; more than one, so that its slots stay full between shards.
        run: ordinal of this run of the driver on its output directory, from 1.
        schema: of the part files, serialised.
    """

    num_replicas: int
    in_flight: int
    run: int
    schema: bytes


class Driver:
    """Runs shards until none is left.

    Attributes:
        events: of the replicas' rounds, once it has run, if they are traced.

    Args:
        shards: shards to do, with their rows; read lazily.
        commits: the open commit log.
        launch: makes the actor of a replica; see `actors.replica.Replica` for its methods.
        runtime: where the actors run.
        release: told of each replica that is not started again.
    """

    def __init__(
        self,
        shards: Iterator[tuple[int, tuple[InputRow, ...]]],
        commits: CommitLog,
        launch: Callable[[int], Any],
        watcher: Watcher,
        config: DriverConfig,
        runtime: Runtime = RAY,
        release: Callable[[int], None] = lambda replica: None,
    ) -> None:
        self._shards = shards
        self._commits = commits
        self._watcher = watcher
        self._config = config
        self._runtime = runtime
        self._release = release
        poll_seconds = max(_POLL_SECONDS, config.num_replicas / _POLLS_A_SECOND)
        self._seats = [Seat(replica, launch, runtime, poll_seconds) for replica in range(config.num_replicas)]
        self._returned: deque[Work] = deque()
        self.events: list[dict[str, Any]] = []
        self._warn_at = runtime.now() + _WAITING_SECONDS
        self._report_at = 0.0

    def run(self) -> None:
        """Commit every shard, or return early when the watcher says so.

        Raises:
            JobError: replicas cannot be kept alive, or a shard ends them and no row of it alone does.
            RasdError: whatever a replica or the watcher raised.
        """
        try:
            while not self._watcher.should_stop():
                self._launch()
                self._fill()
                if not self._has_work():
                    break
                self._handle_events()
                self._report()
            # After a signal: what is finished is committed, the rest is generated again by the next run.
            self._settle(0.0)
            self._watcher.progressed(self.stats)
        finally:
            self._stop()

    def _stop(self) -> None:
        """End all replicas; those that answer in time first, so that one which hangs costs no other's events."""
        asked = {future: seat for seat in self._seats if (future := seat.ask_to_stop()) is not None}
        until = self._runtime.now() + STOP_SECONDS
        while asked and (left := until - self._runtime.now()) > 0:
            for future in self._runtime.wait(list(asked), left):
                self.events += asked.pop(future).stop(until + STOP_SECONDS)
        for seat in self._seats:
            self.events += seat.stop(until)

    @property
    def stats(self) -> ShardStats:
        """Totals of this run, rows of unfinished shards included."""
        return sum((seat.stats for seat in self._seats), ShardStats())

    def _has_work(self) -> bool:
        return bool(self._returned) or any(seat.working for seat in self._seats) or self._peek()

    def _peek(self) -> bool:
        following = next(self._shards, None)
        if following is not None:
            self._returned.append(Work(*following))
        return following is not None

    def _launch(self) -> None:
        if all(seat.is_retired for seat in self._seats):
            raise JobError(
                "every replica was lost again and again; see the reasons above. Often it is memory: lower --slots,"
                " --kv-memory or --num-replicas. The same command resumes the job."
            )
        now = self._runtime.now()
        for seat in self._seats:
            seat.launch_if_due(now)
        if now > self._warn_at and not any(seat.is_ready for seat in self._seats):
            self._warn_at = now + _WAITING_SECONDS
            free = self._runtime.free()
            log.info(
                "no replica is ready yet: they load the model or wait for a place; free are %g CPUs and %g GPUs",
                *(free.get("CPU", 0), free.get("GPU", 0)),
            )

    def _fill(self) -> None:
        """Hand out shards, each to the seat that has fewest: none gets its second while another has none."""
        most = self._config.in_flight
        open_seats = [
            (len(seat.working), seat.replica)
            for seat in self._seats
            if seat.is_ready and len(seat.working) < most and not any(map(_is_suspect, seat.working.values()))
        ]
        heapq.heapify(open_seats)
        while open_seats:
            count, replica = heapq.heappop(open_seats)
            work = self._next(is_idle=count == 0)
            if work is None:
                continue  # what is left may be for idle seats alone
            self._assign(self._seats[replica], work)
            if count + 1 < most and not _is_suspect(work):
                heapq.heappush(open_seats, (count + 1, replica))

    def _next(self, *, is_idle: bool) -> Work | None:
        """The next shard; one that is suspected to end replicas only for an idle seat, where it runs alone."""
        for _ in range(len(self._returned)):
            work = self._returned.popleft()
            if is_idle or not _is_suspect(work):
                return work
            self._returned.append(work)
        following = next(self._shards, None)
        return None if following is None else Work(*following)

    def _assign(self, seat: Seat, work: Work) -> None:
        attempt = self._config.run * ATTEMPTS_A_RUN + work.tries
        task = ShardTask(
            shard=work.shard,
            attempt=attempt,
            rows=work.rows,
            part_path=self._commits.part_path(work.shard, attempt),
            schema=self._config.schema,
            progress=self._commits.progress(work.shard, attempt),
        )
        seat.assign(replace(work, tries=work.tries + 1), task)

    def _handle_events(self) -> None:
        if not self._settle(_TICK_SECONDS):
            self._runtime.sleep(_TICK_SECONDS)
        now = self._runtime.now()
        for seat in self._seats:
            seat.poll(now)

    def _settle(self, timeout: float) -> bool:
        """Wait for what is under way, and take what has ended; False if nothing is under way."""
        seats = {future: seat for seat in self._seats for future in seat.futures()}
        for future in self._runtime.wait(list(seats), timeout) if seats else ():
            seat = seats[future]
            for event in seat.settle(future):
                self._handle(event)
            if seat.is_retired:
                self._release(seat.replica)
        return bool(seats)

    def _report(self) -> None:
        """Tell the watcher how far this run is; not at every event, since all seats are summed."""
        if self._runtime.now() >= self._report_at:
            self._report_at = self._runtime.now() + _TICK_SECONDS
            self._watcher.progressed(self.stats)

    def _handle(self, event: Event) -> None:
        match event:
            case Started(info):
                self._watcher.started(info)
            case Finished(work, result) if work.search is not None:
                self._commits.discard(result)
                self._search_on(work, work.search, ended_replica=False)
            case Finished(_, result):
                self._watcher.committed(self._commits.commit(result))
            case Lost(lost, is_preemption):
                for work in lost:
                    self._return(work, is_preemption)

    def _return(self, work: Work, is_preemption: bool) -> None:
        work = replace(work, kills=work.kills + (not is_preemption))
        if work.search is not None and not is_preemption:
            self._search_on(work, work.search, ended_replica=True)
        elif work.kills < MAX_KILLS or work.search is not None:
            self._returned.appendleft(work)
        elif work.searches < MAX_SEARCHES:
            log.warning(
                "shard %d ended %d replicas; looking for the row that does",
                *(work.shard, work.kills),
                extra={"shard": work.shard},
            )
            self._try(work, Search.over(work.rows))
        else:
            first, last = work.rows[0], work.rows[-1]
            raise JobError(
                f"{work.kills} replicas were lost while they had shard {work.shard}, rows {first.row_index} to"
                f" {last.row_index} (ids {first.id!r} to {last.id!r}), but none of its rows ends one alone. Often it is"
                " memory: lower --slots or --kv-memory. The same command resumes the job."
            )

    def _search_on(self, work: Work, search: Search, *, ended_replica: bool) -> None:
        """After a try: the next one, or all rows once more, the guilty one made an error row."""
        if not search.is_last:
            self._try(work, search.ended_replica() if ended_replica else search.came_through())
            return
        if ended_replica:
            row = search.rows[search.low]
            log.warning(
                "row %d (id %r) ends replicas; it becomes an error row",
                *(row.row_index, row.id),
                extra={"shard": work.shard, "row_index": row.row_index},
            )
            work = replace(work, rows=search.blamed(work.kills), kills=0, search=None, searches=0)
        else:  # not this time; all rows get another chance
            work = replace(work, rows=search.rows, search=None, searches=work.searches + 1)
        self._returned.appendleft(work)

    def _try(self, work: Work, search: Search) -> None:
        self._returned.appendleft(replace(work, rows=search.tried, search=search))


def _is_suspect(work: Work) -> bool:
    return work.kills >= MAX_KILLS - 1 or work.search is not None
