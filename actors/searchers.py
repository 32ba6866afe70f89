"""A replica's side of retrieval: searchers for text in its own process, and for a retrieval service's.

A service that is late, dead or restarting costs a round at most the deadline, yields nothing, and is counted; it is
used again when it is back.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import RayError

from actors.retrieval import group_of
from datastore import Datastore, LiveStore
from datastore.lookup import LookupOptions
from pipeline.lookup import Lookup

_PAUSE_SECONDS = 0.25  # after a call that failed; doubles up to the longest
_LONGEST_PAUSE_SECONDS = 4.0
_SEARCH_SECONDS = 10.0  # for passages of a batch of prompts
_CONTEXT_TOKENS = 17  # the longest match an index tells apart

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetrievalConfig:
    """Where a replica's sources are.

    Attributes:
        mode: `auto`, `shared`, `per-node` or `in-process`.
        datastore: its directory; None without one.
        tokenizer: hash that the datastore's must equal.
        live_capacity: tokens that a live store keeps.
        num_passages: passages looked up for each prompt.
        output: the job's output directory, whose committed rows a live store starts from.
        services: handles of retrieval services by node id, or one under the empty name; empty if all is in process.
        deadline: seconds that a round may wait for a service.
    """

    mode: str
    datastore: str | None
    tokenizer: str
    live_capacity: int
    num_passages: int
    output: str
    services: Mapping[str, Any]
    deadline: float


class Misses:
    """Counts calls that got no answer; shared by a replica's searchers."""

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

    def __init__(self, store: Datastore | None, live: LiveStore | None) -> None:
        self._store = store
        self._live = live
        self._request: tuple[Sequence[np.ndarray], np.ndarray] = ((), np.empty(0, np.int32))

    def send(self, contexts: Sequence[np.ndarray], depths: np.ndarray) -> None:
        self._request = contexts, depths

    def receive(self) -> Mapping[str, Lookup]:
        contexts, depths = self._request
        found: dict[str, Lookup] = {}
        if self._store is not None:
            found["corpus"] = self._store.lookup(contexts, depths=depths)
        if self._live is not None:
            found["live"] = self._live.lookup(contexts, LookupOptions(), depths)
        return found


class _Guard:
    """Decides whether a service is worth a call now, and counts the calls that failed."""

    def __init__(self, misses: Misses) -> None:
        self._misses = misses
        self._pause = _PAUSE_SECONDS
        self._resume_at = 0.0

    @property
    def is_open(self) -> bool:
        return time.monotonic() >= self._resume_at

    def succeeded(self) -> None:
        self._pause, self._resume_at = _PAUSE_SECONDS, 0.0

    def failed(self, error: RayError) -> None:
        self._misses.add()
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

    def __init__(self, service: Any, sources: frozenset[str], deadline: float, misses: Misses) -> None:
        self._lookup = service.lookup.options(concurrency_group=group_of("lookup"))
        self._sources = sources
        self._deadline = deadline
        self._guard = _Guard(misses)
        self._future: Any = None
        self._sent_at = 0.0
        self._late: Any = None  # a call that missed its deadline and may still be at work

    def send(self, contexts: Sequence[np.ndarray], depths: np.ndarray) -> None:
        self._future = None
        if self._late is not None and ray.wait([self._late], timeout=0)[0]:
            self._late = None
        if self._late is None and self._guard.is_open:
            ends = np.full((len(contexts), _CONTEXT_TOKENS), -1, np.int32)
            for row, context in zip(ends, contexts, strict=True):
                end = context[-_CONTEXT_TOKENS:]
                row[_CONTEXT_TOKENS - len(end) :] = end
            self._sent_at = time.monotonic()
            self._future = self._lookup.remote(ends, depths, self._sources)

    def receive(self) -> Mapping[str, Lookup]:
        if self._future is None:
            return {}
        left = self._sent_at + self._deadline - time.monotonic()
        try:
            found: Mapping[str, Lookup] = ray.get(self._future, timeout=max(left, 0.0))
        except RayError as error:
            self._late = self._future
            self._guard.failed(error)
            return {}
        self._guard.succeeded()
        return found


class LiveSink(Protocol):
    """Takes finished outputs."""

    def append(self, sequences: Sequence[np.ndarray]) -> None:
        """Makes them findable soon, [L] int32 each; never fails and never waits."""
        ...


class ServiceSink:
    """Sends outputs to the live stores of all services, and forgets about them."""

    def __init__(self, services: Sequence[Any]) -> None:
        self._appends = [service.append.options(concurrency_group=group_of("append")) for service in services]

    def append(self, sequences: Sequence[np.ndarray]) -> None:
        for append in self._appends:
            append.remote(sequences)


class PassageSource(Protocol):
    """Finds text that is near to prompts."""

    def passages(self, prompts: Sequence[str]) -> list[tuple[np.ndarray, ...]]:
        """Passages for each prompt, [n] int32 token ids each, the nearest first."""
        ...


class LocalPassages:
    """Passages from a datastore in this process."""

    def __init__(self, store: Datastore, k: int) -> None:
        self._store = store
        self._k = k

    def passages(self, prompts: Sequence[str]) -> list[tuple[np.ndarray, ...]]:
        found = self._store.search(prompts, self._k)
        return [tuple(passage.tokens for passage in row) for row in found]


class ServicePassages:
    """Passages from a retrieval service; none while it does not answer."""

    def __init__(self, service: Any, k: int, misses: Misses) -> None:
        self._search = service.search.options(concurrency_group=group_of("search"))
        self._k = k
        self._guard = _Guard(misses)

    def passages(self, prompts: Sequence[str]) -> list[tuple[np.ndarray, ...]]:
        if not self._guard.is_open:
            return [()] * len(prompts)
        try:
            found = ray.get(self._search.remote(prompts, self._k), timeout=_SEARCH_SECONDS)
        except RayError as error:
            self._guard.failed(error)
            return [()] * len(prompts)
        self._guard.succeeded()
        return [tuple(passage.tokens for passage in row) for row in found]
