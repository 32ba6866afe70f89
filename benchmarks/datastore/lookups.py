"""Lookups in process: microseconds a query with its tree, and what they leave to another Python thread."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from datastore import LiveStore
from datastore.lookup import LookupOptions, SegmentSet

BATCH = 64
_SECONDS = 3.0


def contexts_of(tokens: np.ndarray, number: int, seed: int = 0) -> list[np.ndarray]:
    """Ends of text from the corpus, half of them with one token changed, 1 to 17 places from the end: matches of every
    length occur."""
    random = np.random.default_rng(seed)
    most = int(tokens.max())
    found = []
    for i, begin in enumerate(random.integers(0, len(tokens) - 32, number)):
        context = tokens[begin : begin + 32].astype(np.int32)
        if i % 2:
            context[-int(random.integers(1, 18))] = random.integers(0, most)
        found.append(context)
    return found


def measure(searched: SegmentSet, contexts: Sequence[np.ndarray]) -> dict[str, Any]:
    """Warm lookups: microseconds a query in batches of 64 (mean, median and p99 over batches), and of queries alone,
    the Python around the compiled call included."""
    options = LookupOptions()
    batches = [contexts[i : i + BATCH] for i in range(0, len(contexts) - BATCH + 1, BATCH)]
    for batch in batches:
        searched.lookup(batch, options)
    micros, nodes, matches = [], 0, 0
    for batch in batches:
        begin = time.perf_counter()
        found = searched.lookup(batch, options)
        micros.append((time.perf_counter() - begin) / BATCH * 1e6)
        nodes += len(found.tokens)
        matches += int(found.match_lengths.sum())
    singles = []
    for context in contexts[: 64 * BATCH]:
        begin = time.perf_counter()
        searched.lookup([context], options)
        singles.append((time.perf_counter() - begin) * 1e6)
    return {
        "batch": BATCH,
        "queries": BATCH * len(batches),
        "micros_a_query": _summary(micros),
        "micros_of_single_queries": _summary(singles),
        "mean_match": round(matches / (BATCH * len(batches)), 2),
        "mean_nodes": round(nodes / (BATCH * len(batches)), 1),
        "other_thread_speed": round(_other_thread(searched, batches), 3),
    }


def measure_live(tokens: np.ndarray, vocab_size: int) -> dict[str, Any]:
    """Milliseconds that the live store takes to make one more output of 200 tokens findable, over 3,000 of them."""
    live = LiveStore(vocab_size)
    milliseconds = []
    for begin in range(0, 3000 * 200, 200):
        output = tokens[begin : begin + 200]
        start = time.perf_counter()
        live.append([output])
        milliseconds.append((time.perf_counter() - start) * 1e3)
    return {"outputs": len(milliseconds), "tokens": live.num_tokens, "milliseconds": _summary(milliseconds)}


def _summary(values: Sequence[float]) -> dict[str, float]:
    percentiles = {f"p{q}": round(float(np.percentile(values, q)), 2) for q in (50, 99)}
    return {"mean": round(float(np.mean(values)), 2), **percentiles}


def _other_thread(searched: SegmentSet, batches: Sequence[Sequence[np.ndarray]]) -> float:
    """Speed of a counting Python thread while lookups run, over its speed while nothing does."""
    stop = threading.Event()
    options = LookupOptions()

    def search() -> None:
        while not stop.is_set():
            for batch in batches:
                if stop.is_set():
                    return
                searched.lookup(batch, options)

    alone = _count()
    thread = threading.Thread(target=search)
    thread.start()
    beside = _count()
    stop.set()
    thread.join()
    return beside / alone


def _count() -> int:
    counted, end = 0, time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        counted += 1
    return counted
