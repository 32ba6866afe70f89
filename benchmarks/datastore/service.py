"""Lookups through the retrieval actor: latency of one client, throughput of several, and latency by load."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.retrieval import CONCURRENCY_GROUPS, RetrievalService, ServiceConfig
from datastore.format import read_manifest
from pipeline.lookup import Lookup

CONTEXTS = 64
_CLIENTS = (1, 2, 4, 8)
_LOADS = (0.3, 0.5, 0.7, 0.9)
_SECONDS = 4.0


class Client:
    """Asks the service as a replica does, from a process of its own."""

    def __init__(self, service: Any, contexts: np.ndarray) -> None:
        self._lookup = service.lookup.options(concurrency_group="lookup")
        self._contexts = contexts
        self._depths = np.full(CONTEXTS, 16, np.int32)

    def closed_loop(self, seconds: float) -> list[float]:
        """Seconds of each call, one after the other."""
        times = []
        end = time.perf_counter() + seconds
        while (begin := time.perf_counter()) < end:
            self._call(len(times))
            times.append(time.perf_counter() - begin)
        return times

    def open_loop(self, seconds: float, rate: float, seed: int) -> list[float]:
        """Seconds from when each call was due, at random times with `rate` a second, to its answer."""
        random = np.random.default_rng(seed)
        times = []
        due = begin = time.perf_counter()
        while due < begin + seconds:
            time.sleep(max(0.0, due - time.perf_counter()))
            self._call(len(times))
            times.append(time.perf_counter() - due)
            due += random.exponential(1 / rate)
        return times

    def _call(self, number: int) -> None:
        start = number * CONTEXTS % (len(self._contexts) - CONTEXTS)
        contexts = self._contexts[start : start + CONTEXTS]
        found = ray.get(self._lookup.remote(contexts, self._depths, frozenset({"corpus"})))
        assert len(Lookup.from_bytes(found["corpus"])) == CONTEXTS


def measure(store: Path, contexts: Sequence[np.ndarray]) -> dict[str, Any]:
    """Starts one service over a datastore, and clients in processes of their own.

    Returns:
        Milliseconds of a call that does nothing, and of calls with 64 contexts (p50, p99): by number of clients in
        closed loops, with contexts a second of all of them; and by load, as a share of the most that was reached there,
        with calls at random times.
    """
    manifest = read_manifest(store)
    config = ServiceConfig(
        str(store), manifest.tokenizer, manifest.vocab_size, frozenset({"corpus"}), str(store / "none"), 1
    )
    lifted: Any = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(RetrievalService)
    service = lifted.options(num_cpus=0).remote(config)
    assert ray.get(service.wait_ready.options(concurrency_group="control").remote(120.0))
    ends = np.stack([context[-17:] for context in contexts])
    client = ray.remote(Client).options(num_cpus=0)
    clients = [client.remote(service, ends) for _ in range(max(_CLIENTS))]
    ray.get([c.closed_loop.remote(1.0) for c in clients])
    null = service.stats.options(concurrency_group="control")
    nulls = []
    for _ in range(200):
        begin = time.perf_counter()
        ray.get(null.remote())
        nulls.append(time.perf_counter() - begin)
    closed = {}
    for number in _CLIENTS:
        times = ray.get([c.closed_loop.remote(_SECONDS) for c in clients[:number]])
        closed[str(number)] = _summary(np.concatenate(times)) | {
            "contexts_per_second": round(CONTEXTS * sum(map(len, times)) / _SECONDS)
        }
    most = max(entry["contexts_per_second"] for entry in closed.values()) / CONTEXTS
    loaded = {}
    for load in _LOADS:
        rate = load * most / len(clients)
        times = ray.get([c.open_loop.remote(_SECONDS, rate, seed) for seed, c in enumerate(clients)])
        loaded[f"{load:.0%}"] = _summary(np.concatenate(times))
    for actor in [*clients, service]:
        ray.kill(actor)
    return {
        "tokens": manifest.tokens,
        "contexts": CONTEXTS,
        "call_that_does_nothing": _summary(np.array(nulls)),
        "by_clients": closed,
        "by_load": loaded,
    }


def _summary(seconds: np.ndarray) -> dict[str, float]:
    return {f"p{q}_ms": round(float(np.percentile(seconds, q)) * 1e3, 3) for q in (50, 99)}
