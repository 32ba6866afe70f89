"""Where segments are made: Ray tasks, as many at once as the cluster's cores or GPUs allow.

A task lost with its worker or node is tried again a few times; what a task raises is final.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from jobs.cluster import connected
from jobs.seats import LOST
from jobs.segments.task import Built
from pipeline.errors import ConfigError, JobError, RasdError

MAX_TRIES = 3
MAX_AUTO_THREADS = 8
_WAIT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Order:
    """A segment to make.

    Attributes:
        name: of the segment.
        function: `build_segment` or `merge_segment`.
        arguments: but for the last, the work directory, which is `directory`.
    """

    name: str
    function: Callable[..., Built]
    arguments: tuple[Any, ...]
    directory: str


@dataclass(frozen=True, slots=True)
class Room:
    """What tasks get.

    Attributes:
        capacity: how many run at once.
        num_threads, num_gpus: of each.
    """

    capacity: int
    num_threads: int
    num_gpus: int


class Pool(Protocol):
    """Runs orders."""

    room: Room

    @property
    def pending(self) -> int:
        """Orders that are not done."""

    def submit(self, order: Order) -> None:
        """Take an order; its arguments are free once it is done."""

    def done(self) -> Iterator[tuple[Order, Built]]:
        """What is done by now, after waiting a moment for it; raises RasdError."""


@dataclass(slots=True)
class _Running:
    order: Order
    arguments: list[Any]
    tries: int


class RayPool:
    """Orders as Ray tasks."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self._running: dict[Any, _Running] = {}

    @property
    def pending(self) -> int:
        """See `Pool.pending`."""
        return len(self._running)

    def submit(self, order: Order) -> None:
        """See `Pool.submit`."""
        # Put once, so that another try need not send it again.
        self._start(_Running(order, [ray.put(argument) for argument in order.arguments], 0))

    def done(self) -> Iterator[tuple[Order, Built]]:
        """See `Pool.done`."""
        if not self._running:
            return
        futures, _ = ray.wait(list(self._running), num_returns=1, timeout=_WAIT_SECONDS)
        for future in futures:
            running = self._running.pop(future)
            try:
                built: Built = ray.get(future)
            except RayTaskError as error:
                raise _reason(error, running.order.name) from error
            except LOST as error:
                self._retry(running, error)
            except RayError as error:
                raise JobError(
                    f"Ray cannot make the segment {running.order.name}: {error}. Check that every node has this project"
                    " and its dependencies."
                ) from error
            else:
                yield running.order, built

    def _start(self, running: _Running) -> None:
        task: Any = ray.remote(running.order.function).options(
            num_cpus=self.room.num_threads, num_gpus=self.room.num_gpus, max_retries=0
        )
        running.tries += 1
        self._running[task.remote(*running.arguments, running.order.directory)] = running

    def _retry(self, running: _Running, error: RayError) -> None:
        if running.tries == MAX_TRIES:
            raise JobError(
                f"the segment {running.order.name} could not be made: {running.tries} workers were lost with it"
                f" ({str(error).splitlines()[0]}). If memory ran out, give a smaller --segment-tokens; complete"
                " segments stay."
            ) from error
        self._start(running)


@contextlib.contextmanager
def ray_pool(address: str | None, num_threads: int | str, *, wants_gpus: bool) -> Iterator[Pool]:
    """A pool on a Ray cluster, see `jobs.cluster.connected`.

    Args:
        num_threads: of a task, or `auto`.
        wants_gpus: give each task a GPU if the cluster has some.

    Raises:
        ConfigError: there is no such cluster, or no node has the threads asked for.
    """
    with connected(address) as nodes:
        yield RayPool(find_room(nodes, num_threads, wants_gpus=wants_gpus))


def find_room(nodes: Sequence[Mapping[str, float]], num_threads: int | str, *, wants_gpus: bool) -> Room:
    """Divide a cluster among tasks; see `ray_pool`."""
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0.0) >= 1]
    if not cores:
        raise ConfigError("the Ray cluster has no CPUs; add a node with at least one.")
    threads = min(MAX_AUTO_THREADS, *cores) if num_threads == "auto" else int(num_threads)
    if threads > max(cores):
        raise ConfigError(
            f"--num-threads is {threads}; it must be at most {max(cores)}, the cores of the largest node."
        )
    gpus = [int(node.get("GPU", 0.0)) for node in nodes]
    if wants_gpus and any(gpus):
        by_node = [min(int(node.get("CPU", 0.0)) // threads, int(node.get("GPU", 0.0))) for node in nodes]
        if any(by_node):
            return Room(sum(by_node), threads, 1)
    return Room(sum(count // threads for count in cores), threads, 0)


def _reason(error: RayTaskError, name: str) -> RasdError:
    cause = error.cause
    if isinstance(cause, RasdError):
        return cause
    return JobError(
        f"the segment {name} failed: {type(cause).__name__}: {cause}. If memory ran out, give a smaller"
        " --segment-tokens; complete segments stay."
    )
