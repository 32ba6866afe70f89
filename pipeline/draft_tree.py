"""A draft tree while it grows, level by level, after EAGLE-2 (Li et al., arXiv 2406.16858).

At each level the most likely leaves, by cumulative log-probability, are expanded by their most likely tokens; at the
end the most likely nodes of all levels remain. Knows nothing of the draft model: it is handed candidates.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit

from pipeline.forest import Forest
from pipeline.tree import SOURCES, TokenTree, renumbered

_SOURCE = SOURCES.index("draft")
_ROOM = 320  # nodes, before more is needed: five levels of 8 x 8
_MOST_EXPANDED = 48  # likewise
_ROOT = np.array([-1])  # the first frontier
_CERTAIN = np.zeros(1, np.float32)
_NONE = (np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))
# The draft model is not told more than tokens.
_UNKNOWN = np.zeros((_MOST_EXPANDED, len(SOURCES)), np.float32)
_UNMATCHED = np.zeros((_MOST_EXPANDED, len(SOURCES)), np.int16)


class GrowingTree:
    """The tree below one root.

    Attributes:
        tokens, parents: [N] int32 all nodes so far; views, as `logprobs` is.
        logprobs: [N] float32 the draft model's, given the parent.
        frontier: [F] the nodes to be expanded next, -1 for the root.
        num_new: how many of the nodes of `expanded`, at the end, are to be expanded next; 0 before the first level,
            whose only node to be expanded is the root.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._count = 0
        self._nodes = np.empty((2, _ROOM), np.int32)  # token, parent
        self._logprobs = np.empty((2, _ROOM), np.float32)  # given the parent; cumulative
        self.frontier = _ROOT
        self._expanded = np.empty((2, _MOST_EXPANDED), np.int32)  # token, parent among those expanded
        self._num_expanded = 0
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
    def expanded(self) -> TokenTree:
        """The nodes that were expanded, or are to be expanded next, as a tree of their own: what the draft model has to
        see. A view, until it grows again."""
        n = self._num_expanded
        unknown, unmatched = _UNKNOWN, _UNMATCHED
        if n > _MOST_EXPANDED:
            unknown, unmatched = np.zeros((n, len(SOURCES)), np.float32), np.zeros((n, len(SOURCES)), np.int16)
        return TokenTree(self._expanded[0, :n], self._expanded[1, :n], unknown[:n, 0], unknown[:n], unmatched[:n])

    @property
    def frontier_logprobs(self) -> np.ndarray:
        """[F] float32 the draft model's log-probability of each path to the frontier."""
        found: np.ndarray = self._logprobs[1, self.frontier] if self._count else _CERTAIN
        return found

    def narrow(self, keep: np.ndarray) -> None:
        """Expands only part of the frontier next, [F] bool."""
        if not keep.all():
            first = self._num_expanded - self.num_new
            self.frontier = self.frontier[keep]
            self.num_new = len(self.frontier)
            kept = self._expanded[:, first : self._num_expanded][:, keep]
            self._num_expanded = first + self.num_new
            self._expanded[:, first : self._num_expanded] = kept

    def grow(self, logprobs: np.ndarray, tokens: np.ndarray) -> None:
        """Adds the candidates of every node of the frontier and chooses the next one.

        Args:
            logprobs, tokens: [F, k], one row for each node to be expanded (the root, then `expanded`'s last `num_new`);
                candidates of -inf are left out.
        """
        self._nodes = _with_room(self._nodes, self._count + tokens.size)
        self._logprobs = _with_room(self._logprobs, self._count + tokens.size)
        self._expanded = _with_room(self._expanded, self._num_expanded + self._width)
        self._count, self.frontier = _grow(
            *(self._nodes, self._logprobs, self._count, self._expanded, self._num_expanded),
            *(self.frontier, logprobs, tokens, self._width),
        )
        self.num_new = len(self.frontier)
        self._num_expanded += self.num_new

    def likeliest(self, num_nodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The `num_nodes` most likely nodes as a tree: tokens, parents and log-probabilities."""
        nodes: tuple[np.ndarray, np.ndarray, np.ndarray] = _likeliest(
            self._nodes, self._logprobs, self._count, num_nodes
        )
        return nodes


def drafted_forest(trees: Sequence[GrowingTree | None], num_nodes: int) -> Forest:
    """The `num_nodes` most likely nodes of each tree; scores are the draft model's probabilities. Empty for None."""
    parts = [_NONE if tree is None else tree.likeliest(num_nodes) for tree in trees]
    begins = np.cumsum([0, *(len(tokens) for tokens, _, _ in parts)], dtype=np.int64)
    tokens, parents, logprobs = (np.concatenate(column) for column in zip(_NONE, *parts, strict=True))
    sources, matches = np.full(len(tokens), _SOURCE, np.int8), np.zeros(len(tokens), np.int16)
    return Forest.proposed(tokens, parents, np.exp(logprobs), sources, matches, begins)


def _with_room(columns: np.ndarray, size: int) -> np.ndarray:
    """[2, n] with room for so many."""
    missing = size - columns.shape[1]
    return columns if missing <= 0 else np.pad(columns, ((0, 0), (0, max(missing, columns.shape[1]))))


@njit(cache=True, nogil=True)
def _grow(
    nodes: np.ndarray,
    logprobs: np.ndarray,
    count: int,
    expanded: np.ndarray,
    num_expanded: int,
    frontier: np.ndarray,
    new_logprobs: np.ndarray,
    new_tokens: np.ndarray,
    width: int,
) -> tuple[int, np.ndarray]:
    """Adds candidates; returns the number of nodes, and the `width` likeliest new ones (first of equals) in order.

    Those are written behind the `num_expanded`.
    """
    first = count
    above = np.empty(new_tokens.size, np.int32)  # place of each candidate's parent among those expanded
    for i in range(len(frontier)):
        before = logprobs[1, frontier[i]] if frontier[i] >= 0 else np.float32(0.0)
        for j in range(new_tokens.shape[1]):
            if np.isfinite(new_logprobs[i, j]):
                nodes[0, count], nodes[1, count] = new_tokens[i, j], frontier[i]
                logprobs[0, count], logprobs[1, count] = new_logprobs[i, j], before + new_logprobs[i, j]
                above[count - first] = num_expanded - len(frontier) + i if frontier[i] >= 0 else -1
                count += 1
    is_chosen = np.zeros(count - first, np.bool_)
    for _ in range(min(width, count - first)):
        best = -1
        for i in range(count - first):
            if not is_chosen[i] and (best < 0 or logprobs[1, first + i] > logprobs[1, first + best]):
                best = i
        is_chosen[best] = True
    chosen = np.flatnonzero(is_chosen)
    for i in range(len(chosen)):
        expanded[0, num_expanded + i] = nodes[0, first + chosen[i]]
        expanded[1, num_expanded + i] = above[chosen[i]]
    return count, first + chosen


@njit(cache=True, nogil=True)
def _likeliest(
    nodes: np.ndarray, logprobs: np.ndarray, count: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See `GrowingTree.likeliest`; of equal nodes the first are taken, so parents come with their children."""
    keep = np.ones(count, np.bool_)
    keep[np.argsort(-logprobs[1, :count], kind="mergesort")[most:]] = False
    return nodes[0, :count][keep], renumbered(nodes[1, :count], keep), logprobs[0, :count][keep]
