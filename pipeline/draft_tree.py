"""A draft tree while it grows, level by level, after EAGLE-2 (Li et al., arXiv 2406.16858).

At each level the most likely leaves, by cumulative log-probability, are expanded by their most likely tokens; at the
end the most likely nodes of all levels remain. Knows nothing of the draft model: it is handed candidates.
"""

import numpy as np
from numba import njit

from pipeline.tree import EMPTY_TREE, SOURCES, TokenTree, prune

_SOURCE = SOURCES.index("draft")
_ROOM = 320  # nodes, before more is needed: five levels of 8 x 8


class GrowingTree:
    """The tree below one root.

    Attributes:
        tokens, parents: [N] int32 all nodes so far; views, as `logprobs` is.
        logprobs: [N] float32 the draft model's, given the parent.
        frontier: [F] the nodes to be expanded next, -1 for the root.
        expanded: the nodes that were expanded, or are to be expanded next, as a tree of their own: what the draft model
            has to see.
        num_new: how many of those, at the end, are to be expanded next; 0 before the first level, whose only node to be
            expanded is the root.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._count = 0
        self._nodes = np.empty((2, _ROOM), np.int32)  # token, parent
        self._logprobs = np.empty((2, _ROOM), np.float32)  # given the parent; cumulative
        self.frontier = np.array([-1])
        self._chosen = np.empty(0, np.int64)  # nodes in `expanded`, in order
        self.expanded = EMPTY_TREE
        self.num_new = 0

    @property
    def tokens(self) -> np.ndarray:
        return self._nodes[0, : self._count]

    @property
    def parents(self) -> np.ndarray:
        return self._nodes[1, : self._count]

    @property
    def logprobs(self) -> np.ndarray:
        return self._logprobs[0, : self._count]

    @property
    def frontier_values(self) -> np.ndarray:
        """[F] float32 the draft model's probability of each path to the frontier."""
        if not self._count:
            return np.ones(1, np.float32)
        values: np.ndarray = np.exp(self._logprobs[1, self.frontier])
        return values

    def narrow(self, keep: np.ndarray) -> None:
        """Expands only part of the frontier next, [F] bool."""
        if not keep.all():
            self._chosen = self._chosen[: len(self._chosen) - self.num_new]
            self.frontier = self.frontier[keep]
            self._expand()

    def grow(self, logprobs: np.ndarray, tokens: np.ndarray) -> None:
        """Adds the candidates of every node of the frontier and chooses the next one.

        Args:
            logprobs, tokens: [F, k], one row for each node to be expanded (the root, then `expanded`'s last `num_new`);
                candidates of -inf are left out.
        """
        if (missing := self._count + tokens.size - self._nodes.shape[1]) > 0:
            more = ((0, 0), (0, max(missing, self._nodes.shape[1])))
            self._nodes, self._logprobs = np.pad(self._nodes, more), np.pad(self._logprobs, more)
        self._count, self.frontier = _grow(
            self._nodes, self._logprobs, self._count, self.frontier, logprobs, tokens, self._width
        )
        self._expand()

    def tree(self, num_nodes: int) -> TokenTree:
        """The `num_nodes` most likely nodes; scores are the draft model's probabilities."""
        n = self._count
        keep = np.zeros(n, np.bool_)
        keep[np.argsort(-self._logprobs[1, :n], kind="stable")[:num_nodes]] = True
        none = np.zeros(n, np.int16)
        scores = np.exp(self.logprobs)
        return prune(TokenTree.proposed(self.tokens, self.parents, scores, np.full(n, _SOURCE, np.int8), none), keep)

    def _expand(self) -> None:
        """Moves the new frontier into `expanded`."""
        self._chosen = np.concatenate([self._chosen, self.frontier])
        self.num_new = len(self.frontier)
        n = len(self._chosen)
        parents = _parents_among(self._chosen, self._nodes[1])
        unknown = np.zeros((n, len(SOURCES)), np.float32)  # the draft model is not told more than tokens
        self.expanded = TokenTree(
            self._nodes[0, self._chosen], parents, unknown[:, 0], unknown, unknown.astype(np.int16)
        )


@njit(cache=True, nogil=True)
def _grow(
    nodes: np.ndarray,
    logprobs: np.ndarray,
    count: int,
    frontier: np.ndarray,
    new_logprobs: np.ndarray,
    new_tokens: np.ndarray,
    width: int,
) -> tuple[int, np.ndarray]:
    """Adds candidates; returns the number of nodes, and the `width` likeliest new ones (first of equals) in order."""
    first = count
    for i in range(len(frontier)):
        before = logprobs[1, frontier[i]] if frontier[i] >= 0 else np.float32(0.0)
        for j in range(new_tokens.shape[1]):
            if np.isfinite(new_logprobs[i, j]):
                nodes[0, count], nodes[1, count] = new_tokens[i, j], frontier[i]
                logprobs[0, count], logprobs[1, count] = new_logprobs[i, j], before + new_logprobs[i, j]
                count += 1
    is_chosen = np.zeros(count - first, np.bool_)
    for _ in range(min(width, count - first)):
        best = -1
        for i in range(count - first):
            if not is_chosen[i] and (best < 0 or logprobs[1, first + i] > logprobs[1, first + best]):
                best = i
        is_chosen[best] = True
    return count, first + np.flatnonzero(is_chosen)


@njit(cache=True, nogil=True)
def _parents_among(chosen: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """[n] int32 the place of each chosen node's parent among those chosen, -1 for the root."""
    places = np.full(len(chosen), -1, np.int32)
    for i in range(len(chosen)):
        for j in range(i):
            if chosen[j] == parents[chosen[i]]:
                places[i] = j
    return places
