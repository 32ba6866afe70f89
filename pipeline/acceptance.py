"""How likely a retrieved continuation is right, learned from what verification just showed.

One estimate per source and match length m: the probability that the target's next token is among the children of a
node whose last m tokens occurred in that source. The children share it in proportion to their counts. Buckets hold
decayed counts over a prior measured on recorded runs, so a job starts sensibly and follows its own text.
"""

import numpy as np
from numba import njit

from pipeline.forest import Forest
from pipeline.tree import SOURCES
from pipeline.verify import Outcome

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

    def observe(self, trees: Forest, outcome: Outcome) -> None:
        """Learns from one round.

        Args:
            trees: all that was proposed, verified or not.
        """
        columns = (trees.tokens, trees.parents, trees.evidence, trees.matches, trees.begins)
        _count_all(*columns, outcome.choices, outcome.begins, self._hits, self._trials, _DECAY)
        estimate = (self._hits + _PRIOR_WEIGHT * self._prior) / (self._trials + _PRIOR_WEIGHT)
        self.rates = estimate.astype(np.float32)


@njit(cache=True, nogil=True)
def _count_all(
    tokens: np.ndarray,
    parents: np.ndarray,
    evidence: np.ndarray,
    matches: np.ndarray,
    begins: np.ndarray,
    choices: np.ndarray,
    choice_begins: np.ndarray,
    hits: np.ndarray,
    trials: np.ndarray,
    decay: float,
) -> None:
    """`_count` for all trees of a forest."""
    for tree in range(len(begins) - 1):
        own = slice(begins[tree], begins[tree + 1])
        along = choices[choice_begins[tree] : choice_begins[tree + 1]]
        _count(tokens[own], parents[own], evidence[own], matches[own], along, hits, trials, decay)


@njit(cache=True, nogil=True)
def _count(
    tokens: np.ndarray,
    parents: np.ndarray,
    evidence: np.ndarray,
    matches: np.ndarray,
    choices: np.ndarray,
    hits: np.ndarray,
    trials: np.ndarray,
    decay: float,
) -> None:
    """One trial for every source that proposed children of the root or of a node on the target's path; a hit where the
    target chose one of them. It counts for the source's longest match among them."""
    node = -1
    for choice in choices:
        right = -1
        longest = np.full(evidence.shape[1], -1, np.int64)
        for child in range(node + 1, len(parents)):
            if parents[child] == node:
                for source in range(evidence.shape[1]):
                    if evidence[child, source] > 0:
                        longest[source] = max(longest[source], min(matches[child, source], MAX_MATCH))
                if tokens[child] == choice:
                    right = child
        for source in range(evidence.shape[1]):
            match = longest[source]
            if match >= 0:
                is_hit = right >= 0 and evidence[right, source] > 0
                hits[source, match] = hits[source, match] * decay + is_hit
                trials[source, match] = trials[source, match] * decay + 1.0
        if right < 0:
            break
        node = right


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
