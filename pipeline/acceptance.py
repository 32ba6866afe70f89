"""How likely a retrieved continuation is right, learned from what verification just showed.

One estimate per source and match length m: the probability that the target's next token is among the children of a
node whose last m tokens occurred in that source. The children share it in proportion to their counts. Buckets hold
decayed counts over a prior measured on recorded runs, so a job starts sensibly and follows its own text.
"""

import numpy as np
from numba import njit

from pipeline.tree import SOURCES, TokenTree

MAX_MATCH = 32
MIN_VALUE = 0.02  # paths less likely than this are not worth carrying to the selection
_PRIOR_WEIGHT = 16.0
_DECAY = 0.998

# Share of rounds in which some child was accepted, by match length: see docs/LOG.md for the run it comes from.
_PRIOR_KNOTS = (
    *((0, 0.02), (1, 0.34), (2, 0.60), (3, 0.70), (4, 0.75), (6, 0.84), (8, 0.85), (10, 0.88)),
    *((16, 0.91), (24, 0.95), (32, 0.98)),
)


class AcceptanceTable:
    """p(some child accepted | parent accepted) by source and match length: `rates`, [len(SOURCES), MAX_MATCH + 1]."""

    def __init__(self) -> None:
        lengths, rates = zip(*_PRIOR_KNOTS, strict=True)
        self._prior = np.tile(np.interp(np.arange(MAX_MATCH + 1), lengths, rates), (len(SOURCES), 1))
        self._hits = np.zeros_like(self._prior)
        self._trials = np.zeros_like(self._prior)
        self.rates = self._prior.astype(np.float32)

    def observe(self, tree: TokenTree, accepted: np.ndarray) -> None:
        """Learns from one verified tree and its accepted nodes ([A] int32, root down)."""
        _count(tree.parents, tree.matches, tree.sources, accepted, self._hits, self._trials, _DECAY)
        estimate = (self._hits + _PRIOR_WEIGHT * self._prior) / (self._trials + _PRIOR_WEIGHT)
        self.rates = estimate.astype(np.float32)


@njit(cache=True, nogil=True)
def _count(
    parents: np.ndarray,
    matches: np.ndarray,
    sources: np.ndarray,
    accepted: np.ndarray,
    hits: np.ndarray,
    trials: np.ndarray,
    decay: float,
) -> None:
    """One trial for the root and for each accepted node that has children; a hit where one of them was accepted.

    It counts for the source and length of the child with the longest match, the first of equals.
    """
    for step in range(len(accepted) + 1):
        node = accepted[step - 1] if step else -1
        match, source = -1, 0
        for child in range(node + 1, len(parents)):
            if parents[child] == node and min(matches[child], MAX_MATCH) > match:
                match, source = min(matches[child], MAX_MATCH), sources[child]
        if match >= 0:
            hits[source, match] = hits[source, match] * decay + (1.0 if step < len(accepted) else 0.0)
            trials[source, match] = trials[source, match] * decay + 1.0


@njit(cache=True, nogil=True)
def score(
    parents: np.ndarray, weights: np.ndarray, matches: np.ndarray, sources: np.ndarray, rates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Estimated acceptance of a retrieved trie's nodes, and which of them lie on paths worth keeping.

    Args:
        parents, weights, matches, sources: [N]; siblings share their group's rate in proportion to their weights.
        rates: as in `AcceptanceTable`.

    Returns:
        [N] float32 p(accepted | parent accepted), and [N] bool.
    """
    n = len(parents)
    total = np.zeros(n + 1, np.float32)
    best = np.full(n + 1, -1, np.int64)  # the child with the longest match decides for its group
    for i in range(n):
        group = parents[i] + 1
        total[group] += weights[i]
        if best[group] < 0 or matches[i] > matches[best[group]]:
            best[group] = i
    scores = np.empty(n, np.float32)
    values = np.empty(n, np.float32)
    for i in range(n):
        group = parents[i] + 1
        scores[i] = rates[sources[best[group]], matches[best[group]]] * weights[i] / total[group]
        values[i] = scores[i] * (values[parents[i]] if parents[i] >= 0 else np.float32(1.0))
    return scores, values >= MIN_VALUE
