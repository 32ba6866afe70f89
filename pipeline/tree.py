"""Token trees: what drafters and retrievers propose, and what one verification pass checks.

A tree hangs below the root, the last known token, which is not part of it. Flat arrays, parents before children,
siblings with distinct tokens. An empty draft is an empty tree, never None.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

SOURCES = ("draft", "context", "passages", "corpus", "live")
LEAST_EVIDENCE = np.float32(1e-6)  # evidence of a node that its source thinks impossible: it was proposed all the same


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A tree of N candidate continuations.

    Attributes:
        tokens: [N] int32 token ids.
        parents: [N] int32 index of the parent node, -1 for children of the root; always smaller than the node's own
            index.
        scores: [N] float32 estimated p(accepted | parent accepted), in [0, 1].
        evidence: [N, len(SOURCES)] float32 each source's own estimate of the same; 0 where it did not propose the node.
        matches: [N, len(SOURCES)] int16 tokens before the node that occurred in the same order where the source found
            it; 0 if nothing was searched.
    """

    tokens: np.ndarray
    parents: np.ndarray
    scores: np.ndarray
    evidence: np.ndarray
    matches: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sources(self) -> np.ndarray:
        """[N] int8 index into `SOURCES`: the source that is surest of the node, the first of equals."""
        surest: np.ndarray = self.evidence.argmax(axis=1).astype(np.int8)
        return surest

    @staticmethod
    def proposed(
        tokens: np.ndarray, parents: np.ndarray, scores: np.ndarray, sources: np.ndarray, matches: np.ndarray
    ) -> "TokenTree":
        """A tree with one source a node.

        Args:
            sources: [N] int8; matches: [N] int16.
        """
        rows = np.arange(len(tokens))
        evidence = np.zeros((len(tokens), len(SOURCES)), np.float32)
        evidence[rows, sources] = np.maximum(scores, LEAST_EVIDENCE)
        lengths = np.zeros((len(tokens), len(SOURCES)), np.int16)
        lengths[rows, sources] = matches
        return TokenTree(tokens, parents, scores, evidence, lengths)

    @staticmethod
    def of(
        tokens: Sequence[int], parents: Sequence[int], source: str, scores: Sequence[float] | None = None
    ) -> "TokenTree":
        """Builds a tree from plain sequences; scores default to 1."""
        return TokenTree.proposed(
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
def places_in(
    tokens: np.ndarray, parents: np.ndarray, other_tokens: np.ndarray, other_parents: np.ndarray
) -> np.ndarray:
    """For the root (first) and each node of another tree, [M + 1] int64: the node of this tree with the same path, -1
    for the root, -2 if there is none."""
    places = np.full(len(other_tokens) + 1, -2, np.int64)
    places[0] = -1
    for i in range(len(other_tokens)):
        parent = places[other_parents[i] + 1]
        if parent > -2:
            for j in range(parent + 1, len(tokens)):
                if parents[j] == parent and tokens[j] == other_tokens[i]:
                    places[i + 1] = j
                    break
    return places


@njit(cache=True, nogil=True)
def renumbered(parents: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """[K] int32 parents of the nodes with `keep` set, [N] bool, numbered among these. A kept node's parent is kept."""
    place = np.empty(len(parents), np.int32)
    new = np.empty(len(parents), np.int32)
    size = 0
    for i in range(len(parents)):
        if keep[i]:
            place[i] = size
            new[size] = place[parents[i]] if parents[i] >= 0 else -1
            size += 1
    return new[:size]


def prune(tree: TokenTree, keep: np.ndarray) -> TokenTree:
    """The nodes with `keep` set, [N] bool. A kept node's parent must be kept."""
    if keep.all():
        return tree
    parents = renumbered(tree.parents, keep)
    return TokenTree(tree.tokens[keep], parents, tree.scores[keep], tree.evidence[keep], tree.matches[keep])
