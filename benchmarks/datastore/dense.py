"""Dense search against exact search: recall, time and bytes of the two approximate kinds, on given vectors."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from datastore.dense import DenseIndex, write_dense
from datastore.dense_faiss import exact_search, num_codes, num_lists, recall

RESULTS = 10
BATCHES = (1, 64)
REPEATS = 5


def measure(vectors: np.ndarray, queries: np.ndarray) -> dict[str, Any]:
    """Build IVF-SQ8 and IVF-PQ, as `factory_for` has them, and compare each with exhaustive search.

    Args:
        vectors: [P, D] float32, of length 1; at least 40,000, or the recall says little.
        queries: [Q, D] float32, of length 1, none of them a passage's own text.

    Returns:
        For each kind: factory, nprobe, bytes a vector of the FAISS file and on disk in all, recall@10, milliseconds a
        query at batch 1 and 64, seconds to build; `exact_ms` is exhaustive search by matrix product, batch 64.
    """
    lists = f"IVF{num_lists(len(vectors))}"
    codes = num_codes(vectors.shape[1])
    kinds = {"ivf_sq8": f"{lists},SQ8", "ivf_pq": f"OPQ{codes},{lists},PQ{codes}np"}
    stored = vectors.astype(np.float16)
    exact = exact_search(stored, queries, RESULTS)
    results = {name: _measure(vectors, queries, exact, factory) for name, factory in kinds.items()}
    exact_ms = _milliseconds(queries, BATCHES[-1], lambda batch: exact_search(stored, batch, RESULTS))
    return {"passages": len(vectors), "dimension": vectors.shape[1], "exact_ms": exact_ms, **results}


def _measure(vectors: np.ndarray, queries: np.ndarray, exact: np.ndarray, factory: str) -> dict[str, Any]:
    spans = np.zeros((len(vectors), 2), np.uint32)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        begin = time.perf_counter()
        names = write_dense(directory, spans, vectors, factory=factory)
        seconds = time.perf_counter() - begin
        index = DenseIndex.open(directory, *vectors.shape)
        sizes = {name: (directory / name).stat().st_size / len(vectors) for name in names}
        return {
            "factory": factory,
            "nprobe": index.nprobe,
            "faiss_bytes_a_vector": round(sizes["dense.faiss"], 1),
            "disk_bytes_a_vector": round(sum(sizes.values()), 1),
            "recall_at_10": round(recall(index.search(queries, RESULTS)[0], exact), 4),
            "build_seconds": round(seconds, 1),
            **{
                f"ms_batch_{size}": _milliseconds(queries, size, lambda batch: index.search(batch, RESULTS))
                for size in BATCHES
            },
        }


def _milliseconds(queries: np.ndarray, size: int, search: Callable[[np.ndarray], object]) -> float:
    """Median over the batches of the milliseconds a query, after one pass to warm up."""
    times = []
    for batch in _batches(queries, size):
        begin = time.perf_counter()
        search(batch)
        times.append((time.perf_counter() - begin) / len(batch) * 1e3)
    return round(float(np.median(times[len(times) // (REPEATS + 1) :])), 3)


def _batches(queries: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for _ in range(REPEATS + 1):
        for begin in range(0, len(queries), size):
            yield queries[begin : begin + size]
