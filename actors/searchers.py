"""A replica's side of retrieval: searchers for text in its own process, and for a retrieval service's.

A service that is late, dead or restarting costs a round at most the deadline, yields nothing, and is counted; it is
used again when it is back.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import RayError

from actors.retrieval import group_of
from datastore import Datastore, LiveStore, Passage
from datastore.lookup import CONTEXT_TOKENS, LookupOptions
from pipeline.errors import RasdError
from pipeline.lookup import Lookup, context_ends

_PAUSE_SECONDS = 0.25  # after a call that failed; doubles up to the longest
_LONGEST_PAUSE_SECONDS = 4.0
_SEARCH_SECONDS = 10.0  # for passages of a batch of prompts
_MOST_APPENDS = 64  # under way at a service

Timed = Callable[[float], None]  # told how many seconds a call that was answered took

log = logging.getLogger(__name__)


def _untimed(_seconds: float) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class RetrievalConfig:
    """Where a replica's sources are.

    Attributes:
        mode: `auto`, `shared`, `per-node` or `in-process`.
        datastore: its directory; None without one.
        fingerprint: of the datastore, which a directory of that name on another node must equal.
        tokenizer: hash that the datastore's must equal.
        live_capacity: tokens that a live store keeps.
        num_passages: passages looked up for each prompt.
        output: the job's output directory, whose committed rows a live store starts from; None starts empty.
        services: handles of retrieval services by node id, or one under the empty name; empty if all is in process.
        deadline: seconds that a round may wait for a service.
    """

    mode: str
    datastore: str | None
    fingerprint: str | None
    tokenizer: str
    live_capacity: int
    num_passages: int
    output: str | None
    services: Mapping[str, Any]
    deadline: float


class Misses:
    """Counts lookups and searches that got no answer, or not from all sources; shared by a replica's searchers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def add(self) -> None:
        """One more."""
        with self._lock:
            self._count += 1

    def take(self) -> int:
        """How many there were since the last time."""
        with self._lock:
            count, self._count = self._count, 0
        return count


class LocalSearcher:
    """Searches a datastore, a live store, or both, in this process."""

    def __init__(self, store: Datastore | None, live: LiveStore | None, timed: Timed = _untimed) -> None:
        self._store = store
        self._live = live
        self._timed = timed
        self._request: tuple[Sequence[np.ndarray], np.ndarray] = ((), np.empty(0, np.int32))

    def send(self, contexts: Sequence[np.ndarray], depths: np.ndarray) -> None:
        self._request = contexts, depths

    @property
    def is_ready(self) -> bool:
        return True

    def receive(self) -> Mapping[str, Lookup]:
        contexts, depths = self._request
        begin = time.perf_counter()
        found: dict[str, Lookup] = {}
        if self._store is not None:
            found["corpus"] = self._store.lookup(contexts, depths=depths)
        if self._live is not None:
            found["live"] = self._live.lookup(contexts, LookupOptions(), depths)
        self._timed(time.perf_counter() - begin)
        return found


class _Guard:
    """Decides whether a service is worth a call now: not while one that was late is still under way, nor for a while
    after one failed."""

    def __init__(self) -> None:
        self._pause = _PAUSE_SECONDS
        self._resume_at = 0.0
        self._late: Any = None

    @property
    def is_open(self) -> bool:
        if self._late is not None and ray.wait([self._late], timeout=0)[0]:
            self._late = None
        return self._late is None and time.monotonic() >= self._resume_at

    def succeeded(self) -> None:
        self._pause, self._resume_at = _PAUSE_SECONDS, 0.0

    def failed(self, error: RayError, late: Any) -> None:
        self._late = late
        self._resume_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        log.debug("the retrieval service did not answer: %s", error)


class ServiceSearcher:
    """Searches through a retrieval service, with at most one call under way.

    Args:
        service: an actor of `actors.retrieval.RetrievalService`.
        sources: what to search there.
        deadline: seconds from `send` that `receive` waits at most.
    """

    def __init__(
        self, service: Any, sources: frozenset[str], deadline: float, misses: Misses, timed: Timed = _untimed
    ) -> None:
        self._lookup = service.lookup.options(concurrency_group=group_of("lookup"))
        self._sources = sources
        self._deadline = deadline
        self._misses = misses
        self._timed = timed
        self._guard = _Guard()
        self._future: Any = None
        self._sent_at = 0.0

    def send(self, contexts: Sequence[np.ndarray], depths: np.ndarray) -> None:
        self._future = None
        if self._guard.is_open:
            self._sent_at = time.monotonic()
            try:
                self._future = self._lookup.remote(context_ends(contexts, CONTEXT_TOKENS), depths, self._sources)
            except RayError as error:
                self._guard.failed(error, None)

    @property
    def is_ready(self) -> bool:
        return self._future is None or bool(ray.wait([self._future], timeout=0)[0])

    def receive(self) -> Mapping[str, Lookup]:
        found: Mapping[str, bytes] = {}
        if self._future is not None:
            left = self._sent_at + self._deadline - time.monotonic()
            try:
                found = ray.get(self._future, timeout=max(left, 0.0))
                self._timed(time.monotonic() - self._sent_at)
                self._guard.succeeded()
            except RayError as error:
                self._guard.failed(error, self._future)
        if not self._sources <= found.keys():
            self._misses.add()
        return {source: Lookup.from_bytes(data) for source, data in found.items()}


class LiveSink(Protocol):
    """Takes finished outputs."""

    def append(self, sequences: Sequence[np.ndarray]) -> None:
        """Makes them findable soon, [L] int32 each; never fails and never waits."""
        ...


class ServiceSink:
    """Sends outputs to the live stores of all services, and forgets about them."""

    def __init__(self, services: Sequence[Any]) -> None:
        self._appends = [service.append.options(concurrency_group=group_of("append")) for service in services]
        self._under_way: list[Any] = []
        self._lock = threading.Lock()  # several shards of a replica end at once

    def append(self, sequences: Sequence[np.ndarray]) -> None:
        with self._lock:
            if self._under_way:
                _, self._under_way = ray.wait(self._under_way, num_returns=len(self._under_way), timeout=0)
            if len(self._under_way) >= _MOST_APPENDS * len(self._appends):
                return  # a service that stands still must not fill the memory of those who wait for it
            try:
                self._under_way += [append.remote(sequences) for append in self._appends]
            except RayError as error:
                log.debug("an output was not sent to the retrieval service: %s", error)


class PassageSource(Protocol):
    """Finds text that is near to prompts."""

    def passages(self, prompts: Sequence[str]) -> list[tuple[np.ndarray, ...]]:
        """Passages for each prompt, [n] int32 token ids each, the nearest first."""
        ...


class LocalPassages:
    """Passages from a datastore in this process; none if its embedder cannot be loaded here."""

    def __init__(self, store: Datastore, k: int, misses: Misses, timed: Timed = _untimed) -> None:
        self._store = store
        self._k = k
        self._misses = misses
        self._timed = timed
        self._is_usable = True

    def passages(self, prompts: Sequence[str]) -> list[tuple[np.ndarray, ...]]:
        if self._is_usable:
            begin = time.perf_counter()
            try:
                found = self._store.search(prompts, self._k)
                self._timed(time.perf_counter() - begin)
                return _tokens(found)
            except RasdError as error:
                self._is_usable = False
                log.warning("no passages are looked up: %s", error)
        self._misses.add()
        return [()] * len(prompts)


class ServicePassages:
    """Passages from a retrieval service; none while it does not answer."""

    def __init__(self, service: Any, k: int, misses: Misses, timed: Timed = _untimed) -> None:
        self._search = service.search.options(concurrency_group=group_of("search"))
        self._k = k
        self._misses = misses
        self._timed = timed
        self._guard = _Guard()
        self._lock = threading.Lock()  # one search at a time, whichever shard it is for

    def passages(self, prompts: Sequence[str]) -> list[tuple[np.ndarray, ...]]:
        with self._lock:
            if self._guard.is_open:
                future: Any = None
                begin = time.monotonic()
                try:
                    future = self._search.remote(prompts, self._k)
                    found = ray.get(future, timeout=_SEARCH_SECONDS)
                    self._timed(time.monotonic() - begin)
                    self._guard.succeeded()
                    return _tokens(found)
                except RayError as error:
                    self._guard.failed(error, future)
        self._misses.add()
        return [()] * len(prompts)


def _tokens(found: Sequence[Sequence[Passage]]) -> list[tuple[np.ndarray, ...]]:
    return [tuple(passage.tokens for passage in row) for row in found]
