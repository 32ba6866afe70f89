"""The retrieval service: corpus, live outputs and dense search behind one batched call a round and replica.

A plain class; lifted with `ray.remote` and concurrency groups at the call site, so that health and statistics answer
while lookups are under way. Everything slow happens in a thread after construction: until it is done, and for what
the service does not have, answers are empty.
"""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.live_rows import committed_outputs
from datastore import Datastore, LiveStore, Passage
from datastore.lookup import LookupOptions
from pipeline.lookup import Lookup

# Calls answered at once, by group of methods.
CONCURRENCY_GROUPS = {"lookup": 4, "dense": 1, "append": 1, "control": 2}


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """What a service serves.

    Attributes:
        datastore: its directory; None without one.
        tokenizer: hash that the datastore's must equal.
        vocab_size: of the target.
        sources: which of `corpus`, `passages` and `live` it answers for.
        output: the job's output directory, whose committed rows the live store starts from.
        live_capacity: tokens that the live store keeps.
    """

    datastore: str | None
    tokenizer: str
    vocab_size: int
    sources: frozenset[str]
    output: str
    live_capacity: int


@dataclass(frozen=True, slots=True)
class ServiceStats:
    """What a service has done since it started.

    Attributes:
        pid: of its process; another one after a restart.
        busy_seconds: time inside lookups, summed over calls.
        uptime_seconds: since it became ready; busy_seconds over it is its load, in cores.
        live_tokens, live_sequences: what the live store holds.
        failure: why it serves less than it should; None if it does not.
    """

    pid: int
    is_ready: bool
    lookups: int
    contexts: int
    busy_seconds: float
    uptime_seconds: float
    live_tokens: int
    live_sequences: int
    failure: str | None


@dataclass(slots=True)
class _Counters:
    lookups: int = 0
    contexts: int = 0
    busy_seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, contexts: int, seconds: float) -> None:
        with self.lock:
            self.lookups += 1
            self.contexts += contexts
            self.busy_seconds += seconds


class RetrievalService:
    """Serves any number of replicas."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._counters = _Counters()
        self._store: Datastore | None = None
        self._live = LiveStore(config.vocab_size, config.live_capacity) if "live" in config.sources else None
        self._has_passages = False
        self._ready_at: float | None = None
        self._failure: str | None = None
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def lookup(self, contexts: np.ndarray, depths: np.ndarray, sources: frozenset[str]) -> dict[str, bytes]:
        """What followed the ends of contexts, by source, as `Lookup.to_bytes` gives it; sources it does not serve, or
        not yet, are left out.

        Args:
            contexts: [B, L] int32 token ids, the newest last, see `pipeline.lookup.context_ends`.
            depths: [B] int32 deepest node of each.
        """
        begin = time.perf_counter()
        found: dict[str, Lookup] = {}
        options = LookupOptions()
        if self._store is not None and "corpus" in sources:
            found["corpus"] = self._store.lookup(contexts, depths=depths)
        if self._live is not None and "live" in sources:
            found["live"] = self._live.lookup(contexts, options, depths)
        self._counters.add(len(contexts), time.perf_counter() - begin)
        return {source: lookup.to_bytes() for source, lookup in found.items()}

    def search(self, texts: Sequence[str], k: int) -> list[list[Passage]]:
        """The k passages nearest to each text; none before the datastore is open."""
        if self._store is None or not self._has_passages:
            return [[] for _ in texts]
        return self._store.search(texts, k)

    def append(self, sequences: Sequence[np.ndarray]) -> None:
        """Adds finished outputs, [L] int32 each, to the live store."""
        if self._live is not None:
            self._live.append(sequences)

    def wait_ready(self, seconds: float) -> bool:
        """Whether it is ready, after waiting for that at most so long."""
        deadline = time.monotonic() + seconds
        while self._ready_at is None and self._failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._ready_at is not None

    def stats(self) -> ServiceStats:
        """See `ServiceStats`."""
        return ServiceStats(
            pid=os.getpid(),
            is_ready=self._ready_at is not None,
            lookups=self._counters.lookups,
            contexts=self._counters.contexts,
            busy_seconds=self._counters.busy_seconds,
            uptime_seconds=0.0 if self._ready_at is None else time.monotonic() - self._ready_at,
            live_tokens=0 if self._live is None else self._live.num_tokens,
            live_sequences=0 if self._live is None else self._live.num_sequences,
            failure=self._failure,
        )

    def _load(self) -> None:
        config = self._config
        try:
            if self._live is not None:
                self._live.append(committed_outputs(config.output, config.live_capacity))
            if config.datastore is not None and config.sources & {"corpus", "passages"}:
                has_passages = "passages" in config.sources
                self._store = Datastore.open(config.datastore, tokenizer=config.tokenizer, dense=has_passages)
                if has_passages:
                    self._store.search(["warm"], 1)
                    self._has_passages = True
            self._ready_at = time.monotonic()
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise


def group_of(method: str) -> str:
    """Concurrency group of a service's method."""
    return {"lookup": "lookup", "search": "dense", "append": "append"}.get(method, "control")


def load_of(stats: ServiceStats) -> float:
    """Share of one core that lookups took; above 0.7 waiting times grow fast (M/M/1)."""
    return stats.busy_seconds / stats.uptime_seconds if stats.uptime_seconds else 0.0
