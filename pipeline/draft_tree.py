"""A draft tree while it grows, level by level, after EAGLE-2 (Li et al., arXiv 2406.16858).

At each level the most likely leaves, by cumulative log-probability, are expanded by their most likely tokens; at the
end the most likely nodes of all levels remain. Knows nothing of the draft model: it is handed candidates.
"""

import numpy as np

from pipeline.tree import EMPTY_TREE, SOURCES, TokenTree, prune

_SOURCE = SOURCES.index("draft")


class GrowingTree:
    """The tree below one root.

    Attributes:
        tokens, parents: [N] int32 all nodes so far.
        logprobs: [N] float32 the draft model's, given the parent.
        frontier: [F] the nodes to be expanded next, -1 for the root.
        expanded: the nodes that were expanded, or are to be expanded next, as a tree of their own: what the draft model
            has to see.
        num_new: how many of those, at the end, are to be expanded next; 0 before the first level, whose only node to be
            expanded is the root.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self.tokens = np.empty(0, np.int32)
        self.parents = np.empty(0, np.int32)
        self.logprobs = np.empty(0, np.float32)  # of each node given its parent
        self._values = np.empty(0, np.float32)  # cumulative
        self.frontier = np.array([-1])
        self._chosen = np.empty(0, np.int64)  # nodes in `expanded`, in order
        self.expanded = EMPTY_TREE
        self.num_new = 0

    @property
    def frontier_values(self) -> np.ndarray:
        """[F] float32 the draft model's probability of each path to the frontier."""
        logs = np.concatenate([[0.0], self._values])[self.frontier + 1]
        values: np.ndarray = np.exp(logs).astype(np.float32)
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
        before = np.concatenate([[0.0], self._values]).astype(np.float32)[self.frontier + 1]
        keep = np.isfinite(logprobs)
        first = len(self.tokens)
        self.tokens = np.concatenate([self.tokens, tokens[keep]]).astype(np.int32)
        parents = np.broadcast_to(self.frontier[:, None], tokens.shape)[keep]
        self.parents = np.concatenate([self.parents, parents]).astype(np.int32)
        self.logprobs = np.concatenate([self.logprobs, logprobs[keep]])
        self._values = np.concatenate([self._values, (before[:, None] + logprobs)[keep]])
        order = np.argsort(-self._values[first:], kind="stable")[: self._width]
        self.frontier = first + np.sort(order)
        self._expand()

    def tree(self, num_nodes: int) -> TokenTree:
        """The `num_nodes` most likely nodes; scores are the draft model's probabilities."""
        keep = np.zeros(len(self.tokens), np.bool_)
        keep[np.argsort(-self._values, kind="stable")[:num_nodes]] = True
        return prune(self._as_tree(), keep)

    def _as_tree(self) -> TokenTree:
        n = len(self.tokens)
        scores = np.exp(self.logprobs).astype(np.float32)
        none = np.zeros(n, np.int16)
        return TokenTree.proposed(self.tokens, self.parents, scores, np.full(n, _SOURCE, np.int8), none)

    def _expand(self) -> None:
        """Moves the new frontier into `expanded`."""
        self._chosen = np.concatenate([self._chosen, self.frontier])
        self.num_new = len(self.frontier)
        place = np.full(len(self.tokens) + 1, -1, np.int32)  # place[-1] is the root's
        place[self._chosen] = np.arange(len(self._chosen))
        whole = self._as_tree()
        self.expanded = TokenTree(
            whole.tokens[self._chosen],
            place[whole.parents[self._chosen]],
            whole.scores[self._chosen],
            whole.evidence[self._chosen],
            whole.matches[self._chosen],
        )
