"""Token trees: what drafters and retrievers propose, and what one verification pass checks.

A tree hangs below the root, the last known token, which is not part of it. Flat arrays, parents before children,
siblings with distinct tokens. An empty draft is an empty tree, never None.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

SOURCES = ("draft", "context", "passages", "corpus", "live")


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A tree of N candidate continuations.

    Attributes:
        tokens: [N] int32 token ids.
        parents: [N] int32 index of the parent node, -1 for children of the root; always smaller than the node's own
            index.
        scores: [N] float32 estimated p(accepted | parent accepted), in [0, 1].
        sources: [N] int8 index into `SOURCES`: who proposed the node with the highest score.
        matches: [N] int16 tokens before the node that occurred in the same order where it was found; 0 if nothing was
            searched.
    """

    tokens: np.ndarray
    parents: np.ndarray
    scores: np.ndarray
    sources: np.ndarray
    matches: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def of(
        tokens: Sequence[int], parents: Sequence[int], source: str, scores: Sequence[float] | None = None
    ) -> "TokenTree":
        """Builds a tree from plain sequences; scores default to 1."""
        return TokenTree(
            np.asarray(tokens, np.int32),
            np.asarray(parents, np.int32),
            np.ones(len(tokens), np.float32) if scores is None else np.asarray(scores, np.float32),
            np.full(len(tokens), SOURCES.index(source), np.int8),
            np.zeros(len(tokens), np.int16),
        )


EMPTY_TREE = TokenTree.of((), (), SOURCES[0])


@njit(cache=True, nogil=True)
def path_values(parents: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Probability that each node is accepted: the product of scores along its path, [N] float32."""
    values = np.empty(len(parents), np.float32)
    for i in range(len(parents)):
        values[i] = scores[i] * (values[parents[i]] if parents[i] >= 0 else np.float32(1.0))
    return values


@njit(cache=True, nogil=True)
def node_depths(parents: np.ndarray) -> np.ndarray:
    """Depth of each node, 1 for children of the root, [N] int32."""
    depths = np.empty(len(parents), np.int32)
    for i in range(len(parents)):
        depths[i] = depths[parents[i]] + 1 if parents[i] >= 0 else 1
    return depths


@njit(cache=True, nogil=True)
def ancestor_mask(parents: np.ndarray) -> np.ndarray:
    """[N + 1, N + 1] bool for the run root + tree: row i may see column j (its ancestors, the root and itself)."""
    n = len(parents) + 1
    mask = np.zeros((n, n), np.bool_)
    mask[0, 0] = True
    for i in range(1, n):
        mask[i] = mask[parents[i - 1] + 1]
        mask[i, i] = True
    return mask


@njit(cache=True, nogil=True)
def _merge(tokens: np.ndarray, parents: np.ndarray, trees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of all nodes in their union, and how many places there are."""
    n = len(tokens)
    place = np.empty(n, np.int64)
    union_tokens = np.empty(n, np.int32)
    union_parents = np.empty(n, np.int32)
    size = 0
    tree_start = 0
    for i in range(n):
        if i == 0 or trees[i] != trees[i - 1]:
            tree_start = i
        parent = place[tree_start + parents[i]] if parents[i] >= 0 else -1
        found = -1
        for j in range(parent + 1, size):
            if union_parents[j] == parent and union_tokens[j] == tokens[i]:
                found = j
                break
        if found < 0:
            found = size
            union_tokens[size] = tokens[i]
            union_parents[size] = parent
            size += 1
        place[i] = found
    return place, union_parents[:size]


def fuse(trees: Sequence[TokenTree]) -> TokenTree:
    """Union of trees by longest-prefix matching: equal paths become one (RASD, arXiv 2503.03434, section 3.3).

    A node proposed by several trees keeps the source, score and match of the highest score, the first of equals.
    """
    trees = [tree for tree in trees if len(tree)]
    if len(trees) <= 1:
        return trees[0] if trees else EMPTY_TREE
    tokens = np.concatenate([tree.tokens for tree in trees])
    scores = np.concatenate([tree.scores for tree in trees])
    sources = np.concatenate([tree.sources for tree in trees])
    origin = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])
    place, union_parents = _merge(tokens, np.concatenate([tree.parents for tree in trees]), origin)
    order = np.lexsort((-scores, place))  # by place, the highest score first
    best = order[np.searchsorted(place[order], np.arange(len(union_parents)))]
    matches = np.concatenate([tree.matches for tree in trees])
    return TokenTree(tokens[best], union_parents, scores[best], sources[best], matches[best])


def prune(tree: TokenTree, keep: np.ndarray) -> TokenTree:
    """The nodes with `keep` set, [N] bool. A kept node's parent must be kept."""
    if keep.all():
        return tree
    renumber = np.cumsum(keep, dtype=np.int32) - 1
    parents = tree.parents[keep]
    parents = np.where(parents >= 0, renumber[parents], -1).astype(np.int32)
    return TokenTree(tree.tokens[keep], parents, tree.scores[keep], tree.sources[keep], tree.matches[keep])
