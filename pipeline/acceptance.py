"""How likely a retrieved continuation is right, learned from what verification just showed.

One estimate per match length m: the probability that the target's next token is among the children of a node whose
last m tokens occurred before. The children share it in proportion to their counts. Buckets hold decayed counts over a
prior measured on recorded runs, so a job starts sensibly and follows its own text.
"""

import numpy as np
from numba import njit

from pipeline.tree import TokenTree

MAX_MATCH = 32
_PRIOR_WEIGHT = 16.0
_DECAY = 0.998

# Share of rounds in which some child was accepted, by match length: see docs/LOG.md for the run it comes from.
_PRIOR_KNOTS = (
    *((0, 0.02), (1, 0.34), (2, 0.60), (3, 0.70), (4, 0.75), (6, 0.84), (8, 0.85), (10, 0.88)),
    *((16, 0.91), (24, 0.95), (32, 0.98)),
)


class AcceptanceTable:
    """p(some child accepted | parent accepted) by match length, 0 to `MAX_MATCH`."""

    def __init__(self) -> None:
        lengths, rates = zip(*_PRIOR_KNOTS, strict=True)
        self._prior = np.interp(np.arange(MAX_MATCH + 1), lengths, rates)
        self._hits = np.zeros(MAX_MATCH + 1)
        self._trials = np.zeros(MAX_MATCH + 1)
        self.rates = self._prior.astype(np.float32)

    def observe(self, tree: TokenTree, accepted: np.ndarray) -> None:
        """Learns from one verified tree and its accepted nodes ([A] int32, root down)."""
        _count(tree.parents, tree.matches, accepted, self._hits, self._trials, _DECAY)
        estimate = (self._hits + _PRIOR_WEIGHT * self._prior) / (self._trials + _PRIOR_WEIGHT)
        self.rates = estimate.astype(np.float32)


@njit(cache=True, nogil=True)
def _count(
    parents: np.ndarray,
    matches: np.ndarray,
    accepted: np.ndarray,
    hits: np.ndarray,
    trials: np.ndarray,
    decay: float,
) -> None:
    """One trial for the root and for each accepted node that has children; a hit where one of them was accepted."""
    for step in range(len(accepted) + 1):
        node = accepted[step - 1] if step else -1
        match = -1
        for child in range(node + 1, len(parents)):
            if parents[child] == node:
                match = max(match, min(matches[child], MAX_MATCH))
        if match >= 0:
            hits[match] = hits[match] * decay + (1.0 if step < len(accepted) else 0.0)
            trials[match] = trials[match] * decay + 1.0
