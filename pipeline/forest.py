"""The trees of a round's slots side by side, so that a round's bookkeeping is a few compiled calls, not some a slot.

Fusion and pruning of RASD (arXiv 2503.03434, section 3) are done here, for all slots at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import numpy as np
from numba import njit

from pipeline.tree import EMPTY_TREE, LEAST_EVIDENCE, SOURCES, TokenTree, renumbered


@dataclass(frozen=True, slots=True, eq=False)
class Forest(Sequence[TokenTree]):
    """B trees of T nodes in all; tree b has the nodes `begins[b]` to `begins[b + 1]`.

    Attributes:
        tokens, scores, evidence, matches: [T, ...] of all trees, as in `TokenTree`.
        parents: [T] int32 numbered within the node's own tree, -1 for children of its root.
        begins: [B + 1] int64.
    """

    tokens: np.ndarray
    parents: np.ndarray
    scores: np.ndarray
    evidence: np.ndarray
    matches: np.ndarray
    begins: np.ndarray

    @staticmethod
    def of(trees: Sequence[TokenTree]) -> "Forest":
        """These trees; a forest is itself."""
        if isinstance(trees, Forest):
            return trees
        if not any(len(tree) for tree in trees):
            return Forest.empty(len(trees))
        parts = [EMPTY_TREE, *trees]  # which begins at 0
        return Forest(
            np.concatenate([tree.tokens for tree in parts]),
            np.concatenate([tree.parents for tree in parts]),
            np.concatenate([tree.scores for tree in parts]),
            np.concatenate([tree.evidence for tree in parts]),
            np.concatenate([tree.matches for tree in parts]),
            np.cumsum([len(tree) for tree in parts], dtype=np.int64),
        )

    @staticmethod
    def proposed(
        tokens: np.ndarray,
        parents: np.ndarray,
        scores: np.ndarray,
        sources: np.ndarray,
        matches: np.ndarray,
        begins: np.ndarray,
    ) -> "Forest":
        """Trees with one source a node; see `TokenTree.proposed`."""
        return Forest(tokens, parents, scores, *_evidence(scores, sources, matches, len(SOURCES)), begins)

    @staticmethod
    def empty(num_trees: int) -> "Forest":
        """So many empty trees."""
        none = EMPTY_TREE
        begins = np.zeros(num_trees + 1, np.int64)
        return Forest(none.tokens, none.parents, none.scores, none.evidence, none.matches, begins)

    @property
    def num_nodes(self) -> int:
        """Nodes of all trees, T."""
        return len(self.tokens)

    def __len__(self) -> int:
        return len(self.begins) - 1

    @overload
    def __getitem__(self, index: int) -> TokenTree: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenTree]: ...
    def __getitem__(self, index: int | slice) -> TokenTree | list[TokenTree]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"tree {index} of {len(self)}")
        index %= len(self)
        nodes = slice(int(self.begins[index]), int(self.begins[index + 1]))
        return TokenTree(
            self.tokens[nodes], self.parents[nodes], self.scores[nodes], self.evidence[nodes], self.matches[nodes]
        )

    def __iter__(self) -> Iterator[TokenTree]:
        for begin, end in pairwise(self.begins.tolist()):
            nodes = slice(begin, end)
            yield TokenTree(
                self.tokens[nodes], self.parents[nodes], self.scores[nodes], self.evidence[nodes], self.matches[nodes]
            )

    def taken(self, order: Sequence[int]) -> "Forest":
        """These trees in another order, or some of them; -1 is an empty one."""
        if list(order) == list(range(len(self))):
            return self
        return Forest.of([self[i] if i >= 0 else EMPTY_TREE for i in order])

    def followed_by_empty(self, num_trees: int) -> "Forest":
        """So many empty trees behind these."""
        begins = np.append(self.begins, np.full(num_trees, self.begins[-1]))
        return Forest(self.tokens, self.parents, self.scores, self.evidence, self.matches, begins)

    def with_scores(self, scores: np.ndarray) -> "Forest":
        """The same nodes with other scores, [T] float32."""
        return Forest(self.tokens, self.parents, scores, self.evidence, self.matches, self.begins)

    def values(self) -> np.ndarray:
        """[T] float32 probability that each node is accepted: the product of scores along its path."""
        values: np.ndarray = _values(self.parents, self.scores, self.begins)
        return values

    def pruned(self, keep: np.ndarray) -> "Forest":
        """The nodes with `keep` set, [T] bool. A kept node's parent must be kept."""
        if keep.all():
            return self
        columns = (self.tokens, self.parents, self.scores, self.evidence, self.matches)
        return Forest(*_pruned(*columns, self.begins, keep))


def fuse_forests(forests: Sequence[Forest]) -> Forest:
    """Each slot's trees as one, by longest-prefix matching: equal paths become one (RASD, section 3.3).

    A node proposed by several trees keeps the evidence of all, and the highest score until a calibration weighs it.

    Args:
        forests: one at least, of as many trees each; those of the first come first.
    """
    fused = forests[0]
    assert all(len(other) == len(fused) for other in forests)
    for other in forests[1:]:
        if fused.num_nodes and other.num_nodes:
            fused = Forest(*_union(*_columns(fused), *_columns(other)))
        elif other.num_nodes:
            fused = other
    return fused


def fuse(trees: Sequence[TokenTree]) -> TokenTree:
    """Trees of one slot as one, see `fuse_forests`."""
    return fuse_forests([Forest.of([tree]) for tree in trees])[0] if trees else EMPTY_TREE


def _columns(forest: Forest) -> tuple[np.ndarray, ...]:
    return forest.tokens, forest.parents, forest.scores, forest.evidence, forest.matches, forest.begins


@njit(cache=True, nogil=True)
def _evidence(
    scores: np.ndarray, sources: np.ndarray, matches: np.ndarray, num_sources: int
) -> tuple[np.ndarray, np.ndarray]:
    """[T, sources] evidence and match lengths of nodes with one source each."""
    evidence = np.zeros((len(scores), num_sources), np.float32)
    lengths = np.zeros((len(scores), num_sources), np.int16)
    for i in range(len(scores)):
        evidence[i, sources[i]] = max(scores[i], LEAST_EVIDENCE)
        lengths[i, sources[i]] = matches[i]
    return evidence, lengths


@njit(cache=True, nogil=True)
def _values(parents: np.ndarray, scores: np.ndarray, begins: np.ndarray) -> np.ndarray:
    values = np.empty(len(parents), np.float32)
    for tree in range(len(begins) - 1):
        first = begins[tree]
        for i in range(first, begins[tree + 1]):
            values[i] = scores[i] * (values[first + parents[i]] if parents[i] >= 0 else np.float32(1.0))
    return values


@njit(cache=True, nogil=True)
def _pruned(
    tokens: np.ndarray,
    parents: np.ndarray,
    scores: np.ndarray,
    evidence: np.ndarray,
    matches: np.ndarray,
    begins: np.ndarray,
    keep: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    kept = np.flatnonzero(keep)
    new_parents = np.empty(len(kept), np.int32)
    new_begins = np.zeros_like(begins)
    for tree in range(len(begins) - 1):
        own = slice(begins[tree], begins[tree + 1])
        above = renumbered(parents[own], keep[own])
        new_begins[tree + 1] = new_begins[tree] + len(above)
        new_parents[new_begins[tree] : new_begins[tree + 1]] = above
    return tokens[kept], new_parents, scores[kept], evidence[kept], matches[kept], new_begins


@njit(cache=True, nogil=True)
def _union(
    tokens: np.ndarray,
    parents: np.ndarray,
    scores: np.ndarray,
    evidence: np.ndarray,
    matches: np.ndarray,
    begins: np.ndarray,
    other_tokens: np.ndarray,
    other_parents: np.ndarray,
    other_scores: np.ndarray,
    other_evidence: np.ndarray,
    other_matches: np.ndarray,
    other_begins: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The union, tree by tree, of two forests: the columns of each as of a `Forest`."""
    most, num_sources = len(tokens) + len(other_tokens), evidence.shape[1]
    new_tokens, new_parents = np.empty(most, np.int32), np.empty(most, np.int32)
    new_scores = np.empty(most, np.float32)
    new_evidence = np.empty((most, num_sources), np.float32)
    new_matches = np.empty((most, num_sources), np.int16)
    new_begins = np.zeros_like(begins)
    place = np.empty(len(other_tokens), np.int32)  # of the other's nodes within the united tree
    size = 0
    for tree in range(len(begins) - 1):
        first = size
        for i in range(begins[tree], begins[tree + 1]):
            new_tokens[size], new_parents[size], new_scores[size] = tokens[i], parents[i], scores[i]
            new_evidence[size], new_matches[size] = evidence[i], matches[i]
            size += 1
        own_end = size  # what is added behind has no equals: siblings of one tree are distinct
        other = other_begins[tree]
        for i in range(other, other_begins[tree + 1]):
            parent = place[other + other_parents[i]] if other_parents[i] >= 0 else np.int32(-1)
            found = -1
            for j in range(first + parent + 1, own_end):
                if new_parents[j] == parent and new_tokens[j] == other_tokens[i]:
                    found = j
                    break
            if found < 0:
                found = size
                size += 1
                new_tokens[found], new_parents[found], new_scores[found] = other_tokens[i], parent, other_scores[i]
                new_evidence[found], new_matches[found] = other_evidence[i], other_matches[i]
            else:
                new_scores[found] = max(new_scores[found], other_scores[i])
                for source in range(num_sources):
                    new_evidence[found, source] = max(new_evidence[found, source], other_evidence[i, source])
                    new_matches[found, source] = max(new_matches[found, source], other_matches[i, source])
            place[i] = found - first
        new_begins[tree + 1] = size
    return (
        new_tokens[:size],
        new_parents[:size],
        new_scores[:size],
        new_evidence[:size],
        new_matches[:size],
        new_begins,
    )
