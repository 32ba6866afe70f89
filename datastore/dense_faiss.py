"""FAISS for the dense index: which kind for how many vectors, how it is trained, searched and tuned.

FAISS proposes candidates from compressed vectors; the stored fp16 vectors rank them exactly. How many inverted lists a
search visits (nprobe) is found when the index is built, by measuring recall on a sample of its own vectors, and lies in
the FAISS file. Knows arrays only, no segments.
"""

import math
from bisect import bisect_left
from typing import Any, Final

import faiss
import numpy as np

FLAT_BELOW: Final = 10_000  # passages; exact search takes 1 ms or so there
PRODUCT_ABOVE: Final = 1_000_000

# Lists are tuned on passages, which lie closer to each other than questions do to them: the lists that find 99% of a
# passage's neighbours, twice over, find 94 to 95% of a prompt's, four times over 98% (docs/LOG.md, 2026-11-25).
TARGET_RECALL: Final = 0.99
MARGIN: Final = 4

_MAX_LISTS = 16_384
_TRAINING_ROWS_A_LIST = 64
_MAX_TRAINING_ROWS = 262_144
_CANDIDATES_A_RESULT = 32
_MIN_CANDIDATES = 320
_GPU_LIMIT = 2_048  # most lists and candidates that FAISS takes on a GPU
_CHUNK = 65_536  # rows decoded to fp32 at a time
_TUNING_QUERIES = 256
_TUNING_RESULTS = 10
_ROUNDING = 1e-5  # of fp32 scores
_ROTATION_ROUNDS = 10  # of OPQ's training; FAISS's 50 take 50 s more and found no more


def factory_for(num_passages: int, dimension: int) -> str:
    """FAISS factory string by size.

    - below 10,000 passages `Flat`: exact, 4 bytes a component;
    - up to 1,000,000 `IVFn,SQ8`: n lists, 1 byte a component;
    - above `OPQm,IVFn,PQm`: 1 byte for 8 components.

    n is the power of two next to 8 sqrt(passages), at most 16,384: of 128 to 2,048 lists for 44,000 MiniLM vectors of
    MedQuAD, more lists found the same with less time.
    """
    if num_passages < FLAT_BELOW:
        return "Flat"
    lists = f"IVF{num_lists(num_passages)}"
    if num_passages <= PRODUCT_ABOVE:
        return f"{lists},SQ8"
    codes = num_codes(dimension)
    return f"OPQ{codes},{lists},PQ{codes}np"  # np: no polysemous training, which takes 30 times as long as the rest


def num_lists(num_passages: int) -> int:
    """Inverted lists for so many passages."""
    return min(1 << round(math.log2(8 * math.sqrt(num_passages))), _MAX_LISTS)


def num_codes(dimension: int) -> int:
    """Bytes a passage of a product quantiser: one for 8 components, or the next fewer that divide them evenly."""
    return next(count for count in range(max(1, dimension // 8), 0, -1) if dimension % count == 0)


def build_index(vectors: np.ndarray, factory: str) -> Any:
    """A trained, filled and tuned FAISS index by inner product; the same vectors give the same index.

    Args:
        vectors: [P, D] float16, of length 1.
    """
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    ivf = inverted_file(index)
    if not index.is_trained:
        rows = _MAX_TRAINING_ROWS if ivf is None else min(_TRAINING_ROWS_A_LIST * ivf.nlist, _MAX_TRAINING_ROWS)
        if ivf is not None:
            ivf.cp.min_points_per_centroid = 1  # a small index is no reason to warn
            if has_gpu():
                helper = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(ivf.d))  # FAISS keeps a bare pointer to it
                ivf.clustering_index = helper
        if isinstance(index, faiss.IndexPreTransform):
            chain: Any = index.chain
            rotation: Any = faiss.downcast_VectorTransform(chain.at(0))
            rotation.niter = _ROTATION_ROUNDS
        index.train(_sample(vectors, rows).astype(np.float32))
        if ivf is not None:
            ivf.clustering_index = None
    for begin in range(0, len(vectors), _CHUNK):
        index.add(vectors[begin : begin + _CHUNK].astype(np.float32))
    if ivf is not None:
        ivf.nprobe = tuned_nprobe(index, ivf.nlist, vectors)
    return index


def inverted_file(index: Any) -> Any | None:
    """The part of an index with inverted lists, behind any transformation; None for an exhaustive one."""
    return faiss.try_extract_index_ivf(index)


def has_gpu() -> bool:
    """Whether this FAISS can compute on a GPU, and one is there."""
    return hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0


def read_index(path: str) -> Any:
    """An index from its file, on the GPU if there is one; inverted lists are mapped, not read.

    Raises:
        RuntimeError: FAISS cannot read it.
    """
    index = faiss.read_index(path, faiss.IO_FLAG_MMAP)
    if has_gpu():
        return faiss.index_cpu_to_all_gpus(index)
    if (ivf := inverted_file(index)) is not None:
        # FAISS would start 32 threads a search to touch the lists, which costs more than most searches.
        lists: Any = faiss.downcast_InvertedLists(ivf.invlists)
        lists.prefetch_nthread = 0
    return index


def search(
    index: Any, vectors: np.ndarray, queries: np.ndarray, k: int, nprobe: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k best passages of each query: candidates from FAISS, ranked by the exact inner product.

    Candidates are 32 a result, at least 320 and at most 2,048 or k. Equal scores are ranked by passage number.

    Args:
        vectors: [P, D] float16.
        queries: [Q, D] float32.
        nprobe: lists to visit; None takes the index's own.

    Returns:
        Scores [Q, k] float32, descending, and passage numbers [Q, k] int64; -inf and -1 where there are fewer than k.
    """
    scores = np.full((len(queries), k), -np.inf, np.float32)
    passages = np.full((len(queries), k), -1, np.int64)
    wanted = min(max(_CANDIDATES_A_RESULT * k, _MIN_CANDIDATES), _GPU_LIMIT)
    num_candidates = min(max(wanted, k), len(vectors))
    if num_candidates == 0 or len(queries) == 0:
        return scores, passages
    _, candidates = index.search(queries, num_candidates, params=_parameters(index, nprobe))
    for row, query in enumerate(queries):
        found = np.sort(candidates[row])
        found = found[np.searchsorted(found, 0) :]  # FAISS fills up with -1
        # One dot product a row: a matrix product rounds by position, and equal vectors would score differently.
        exact = np.vecdot(vectors[found].astype(np.float32), query)
        best = np.argsort(-exact, kind="stable")[:k]
        scores[row, : len(best)] = exact[best]
        passages[row, : len(best)] = found[best]
    return scores, passages


def exact_search(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Scores [Q, k] float32 of the best by exhaustive search, descending; arguments as `search`, k at most P."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    for begin in range(0, len(vectors), _CHUNK):
        scores = np.hstack([best, queries @ vectors[begin : begin + _CHUNK].astype(np.float32).T])
        best = -np.partition(-scores, k - 1, axis=1)[:, :k]
    return -np.sort(-best, axis=1)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of found scores [Q, k] that are among the exact ones [Q, k]; of equal passages any will do."""
    return float((found >= exact[:, -1:] - _ROUNDING).mean())


def tuned_nprobe(index: Any, num_lists: int, vectors: np.ndarray) -> int:
    """How many lists to visit: MARGIN times the least number that finds TARGET_RECALL of what all lists find.

    Measured at 10 results on a sample of the vectors; a query's own vector, which every search finds, does not count.
    """
    most = min(num_lists, _GPU_LIMIT)
    k = min(_TUNING_RESULTS + 1, len(vectors))
    queries = _sample(vectors, _TUNING_QUERIES).astype(np.float32)
    exact = exact_search(vectors, queries, k)[:, 1:]

    def recall_at(nprobe: int) -> float:
        return recall(search(index, vectors, queries, k, nprobe)[0][:, 1:], exact)

    wanted = TARGET_RECALL * recall_at(most)
    enough = bisect_left(range(most), True, lo=1, key=lambda nprobe: recall_at(nprobe) >= wanted)
    return min(MARGIN * enough, most)


def _sample(vectors: np.ndarray, most: int) -> np.ndarray:
    """At most so many rows, spread at random, the same for the same number of vectors."""
    if len(vectors) <= most:
        return vectors
    rows = np.random.default_rng(0).choice(len(vectors), most, replace=False, shuffle=False)
    return vectors[np.sort(rows)]


def _parameters(index: Any, nprobe: int | None) -> Any | None:
    if nprobe is None or inverted_file(index) is None:
        return None
    # FAISS's type stubs lack these keywords.
    parameters = faiss.SearchParametersIVF(nprobe=nprobe)  # type: ignore[call-arg]
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=parameters)  # type: ignore[call-arg]
    return parameters
