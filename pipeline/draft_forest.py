"""A round's draft trees while they grow, side by side and level by level, after EAGLE-2 (Li et al., arXiv 2406.16858).

At each level the most likely leaves of a tree, by cumulative log-probability, are expanded by their most likely tokens;
at the end the most likely nodes of all levels remain. Knows nothing of the draft model: it is handed candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from pipeline.forest import Forest
from pipeline.tree import SOURCES, TokenTree, places_in, renumbered

_SOURCE = SOURCES.index("draft")


@dataclass(frozen=True, slots=True)
class Seen:
    """What a draft model sees of W trees: those of their nodes that it has expanded or is to expand next.

    Attributes:
        tokens, parents: [E] int32, tree by tree; the parents' numbers among the tree's; the newest last.
        num_nodes: [W] int64 of each tree.
        num_done: [W] int32 how many of its root and of these it has computed before.
        places, above: [F] int64 of each node of the frontier its place in its tree, and its parent's: 0 the root's,
            behind it these nodes'; -1 for what is before the root.
    """

    tokens: np.ndarray
    parents: np.ndarray
    num_nodes: np.ndarray
    num_done: np.ndarray
    places: np.ndarray
    above: np.ndarray


class GrowingForest:
    """B trees.

    Attributes:
        level: levels that have been computed.
        views: [W] int64 the trees that have nodes to be expanded next.
        begins: [W + 1] int64 where each one's part of the frontier begins.
        frontier: [F] int32 the nodes to be expanded next, numbered within their trees; -1 for the root.
        frontier_views: [F] int64 the tree of each.

    Args:
        depths: [B] levels wanted of each tree; none where it is 0 or less.
        width: most nodes of a tree that a level expands.
        branches: most candidates of each of them.
    """

    def __init__(self, depths: Sequence[int], width: int, branches: int) -> None:
        self._depths = np.asarray(depths, np.int64)
        self._width = width
        num_trees, most = len(self._depths), width * (max([1, *depths]) - 1)
        # Of each tree's nodes token and parent, log-probability given the parent and cumulative.
        self._nodes = np.empty((num_trees, 2, (1 + most) * branches), np.int32)
        self._logprobs = np.empty((num_trees, 2, (1 + most) * branches), np.float32)
        self._counts = np.zeros(num_trees, np.int64)
        # Of those that were expanded, or are to be next, token and parent among them: what the draft model has to see.
        self._expanded = np.empty((num_trees, 2, most), np.int32)
        self._num_expanded = np.zeros(num_trees, np.int64)
        self.level = 0
        self.views = np.flatnonzero(self._depths > 0)
        self.begins = np.arange(len(self.views) + 1)
        self.frontier = np.full(len(self.views), -1, np.int32)
        self.frontier_views = self.views

    @property
    def frontier_logprobs(self) -> np.ndarray:
        """[F] float32 the draft model's log-probability of each path to the frontier."""
        if not self.level:
            return np.zeros(len(self.frontier), np.float32)
        found: np.ndarray = self._logprobs[self.frontier_views, 1, self.frontier]
        return found

    def narrow(self, keep: np.ndarray) -> None:
        """Expands only part of the frontier next, [F] bool; a tree of which nothing is kept grows no further."""
        if not keep.all():
            self.views, self.begins, self.frontier = _narrow(
                *(self.views, self.begins, self.frontier, keep, self._expanded, self._num_expanded)
            )
            self.frontier_views = np.repeat(self.views, np.diff(self.begins))

    def grow(self, logprobs: np.ndarray, tokens: np.ndarray) -> None:
        """Adds the candidates of every node of the frontier and chooses the next one.

        Args:
            logprobs, tokens: [F, k]; candidates of -inf are left out.
        """
        self.level += 1
        self.views, self.begins, self.frontier = _grow(
            *(self._nodes, self._logprobs, self._counts, self._expanded, self._num_expanded, self._depths - self.level),
            *(self.views, self.begins, self.frontier, logprobs, tokens, self._width),
        )
        self.frontier_views = np.repeat(self.views, np.diff(self.begins))

    def places_in(self, found: Forest) -> np.ndarray:
        """[F] int64 of each node of the frontier, the node of other trees of the same views with the same path.

        Their roots and nodes are numbered through, tree by tree; -1 where there is none.
        """
        places: np.ndarray = _places_in(
            *(found.tokens, found.parents, found.begins),
            *(self._nodes, self._counts, self.views, self.begins, self.frontier),
        )
        return places

    def seen(self) -> Seen:
        """What the draft model has to see for the next level."""
        return Seen(*_seen(self._expanded, self._num_expanded, self.views, self.begins, self.frontier))

    def expanded_of(self, view: int) -> TokenTree:
        """The same of one tree. A view, until it grows again."""
        tokens, parents = self._expanded[view, :, : self._num_expanded[view]]
        nothing = np.zeros((2, len(tokens), len(SOURCES)), np.float32)
        return TokenTree(tokens, parents, nothing[0, :, 0], nothing[0], nothing[1].astype(np.int16))

    def tree(self, view: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All nodes of a tree so far: tokens and parents [N] int32, and the draft model's log-probabilities given the
        parent [N] float32. Views."""
        count = self._counts[view]
        return self._nodes[view, 0, :count], self._nodes[view, 1, :count], self._logprobs[view, 0, :count]

    def likeliest(self, num_nodes: int) -> Forest:
        """The `num_nodes` most likely nodes of each tree; scores are the draft model's probabilities."""
        tokens, parents, logprobs, begins = _likeliest(self._nodes, self._logprobs, self._counts, num_nodes)
        sources, matches = np.full(len(tokens), _SOURCE, np.int8), np.zeros(len(tokens), np.int16)
        return Forest.proposed(tokens, parents, np.exp(logprobs), sources, matches, begins)


@njit(cache=True, nogil=True)
def _narrow(
    views: np.ndarray,
    begins: np.ndarray,
    frontier: np.ndarray,
    keep: np.ndarray,
    expanded: np.ndarray,
    num_expanded: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Views, begins and frontier of what is kept; what is not is no more among those expanded."""
    new_views, new_begins, new_frontier = np.empty_like(views), np.zeros_like(begins), np.empty_like(frontier)
    num_views, size = 0, 0
    for i in range(len(views)):
        tree, before = views[i], size
        if frontier[begins[i]] >= 0:
            num_expanded[tree] -= begins[i + 1] - begins[i]
        first = num_expanded[tree]
        for j in range(begins[i], begins[i + 1]):
            if keep[j]:
                new_frontier[size] = frontier[j]
                size += 1
                if frontier[j] >= 0:
                    expanded[tree, :, num_expanded[tree]] = expanded[tree, :, first + j - begins[i]]
                    num_expanded[tree] += 1
        if size > before:
            new_views[num_views] = tree
            num_views += 1
            new_begins[num_views] = size
    return new_views[:num_views], new_begins[: num_views + 1], new_frontier[:size]


@njit(cache=True, nogil=True)
def _grow(
    nodes: np.ndarray,
    logprobs: np.ndarray,
    counts: np.ndarray,
    expanded: np.ndarray,
    num_expanded: np.ndarray,
    levels_left: np.ndarray,
    views: np.ndarray,
    begins: np.ndarray,
    frontier: np.ndarray,
    new_logprobs: np.ndarray,
    new_tokens: np.ndarray,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Adds candidates; returns views, begins and nodes of the next frontier.

    That is the `width` likeliest new nodes (first of equals), in order, of each tree that is to grow on. They are
    written behind those expanded.
    """
    num_branches = new_tokens.shape[1]
    new_views, new_begins = np.empty_like(views), np.zeros_like(begins)
    new_frontier = np.empty(len(views) * width, np.int32)
    above = np.empty(width * num_branches + 1, np.int32)  # place of each candidate's parent among those expanded
    is_chosen = np.empty(width * num_branches + 1, np.bool_)
    num_views, size = 0, 0
    for i in range(len(views)):
        tree, first = views[i], counts[views[i]]
        count = first
        for j in range(begins[i], begins[i + 1]):
            parent = frontier[j]
            before = logprobs[tree, 1, parent] if parent >= 0 else np.float32(0.0)
            for k in range(num_branches):
                if np.isfinite(new_logprobs[j, k]):
                    nodes[tree, 0, count], nodes[tree, 1, count] = new_tokens[j, k], parent
                    logprobs[tree, 0, count], logprobs[tree, 1, count] = new_logprobs[j, k], before + new_logprobs[j, k]
                    above[count - first] = num_expanded[tree] - (begins[i + 1] - j) if parent >= 0 else -1
                    count += 1
        counts[tree] = count
        if count == first or levels_left[tree] <= 0:
            continue
        is_chosen[: count - first] = False
        for _ in range(min(width, count - first)):
            best = -1
            for j in range(count - first):
                if not is_chosen[j] and (best < 0 or logprobs[tree, 1, first + j] > logprobs[tree, 1, first + best]):
                    best = j
            is_chosen[best] = True
        for j in range(count - first):
            if is_chosen[j]:
                new_frontier[size] = first + j
                size += 1
                expanded[tree, 0, num_expanded[tree]] = nodes[tree, 0, first + j]
                expanded[tree, 1, num_expanded[tree]] = above[j]
                num_expanded[tree] += 1
        new_views[num_views] = tree
        num_views += 1
        new_begins[num_views] = size
    return new_views[:num_views], new_begins[: num_views + 1], new_frontier[:size]


@njit(cache=True, nogil=True)
def _places_in(
    found_tokens: np.ndarray,
    found_parents: np.ndarray,
    found_begins: np.ndarray,
    nodes: np.ndarray,
    counts: np.ndarray,
    views: np.ndarray,
    begins: np.ndarray,
    frontier: np.ndarray,
) -> np.ndarray:
    places = np.full(len(frontier), -1, np.int64)
    for i in range(len(views)):
        tree = views[i]
        own = slice(found_begins[tree], found_begins[tree + 1])
        root = found_begins[tree] + tree
        if frontier[begins[i]] < 0:
            places[begins[i]] = root
        elif found_begins[tree + 1] > found_begins[tree]:
            count = counts[tree]
            each = places_in(found_tokens[own], found_parents[own], nodes[tree, 0, :count], nodes[tree, 1, :count])
            for j in range(begins[i], begins[i + 1]):
                if each[frontier[j] + 1] >= -1:
                    places[j] = root + 1 + each[frontier[j] + 1]
    return places


@njit(cache=True, nogil=True)
def _seen(
    expanded: np.ndarray, num_expanded: np.ndarray, views: np.ndarray, begins: np.ndarray, frontier: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The columns of `Seen`."""
    num_nodes, num_done = num_expanded[views], np.empty(len(views), np.int32)
    tokens, parents = np.empty(num_nodes.sum(), np.int32), np.empty(num_nodes.sum(), np.int32)
    places, above = np.empty(len(frontier), np.int64), np.empty(len(frontier), np.int64)
    first = 0
    for i in range(len(views)):
        count = num_nodes[i]
        tokens[first : first + count] = expanded[views[i], 0, :count]
        parents[first : first + count] = expanded[views[i], 1, :count]
        num_done[i] = 0
        for j in range(begins[i], begins[i + 1]):
            if frontier[j] < 0:
                places[j], above[j] = 0, -1
            else:
                place = count - (begins[i + 1] - j)
                places[j], above[j] = place + 1, parents[first + place] + 1
                num_done[i] = 1 + count - (begins[i + 1] - begins[i])
        first += count
    return tokens, parents, num_nodes, num_done, places, above


@njit(cache=True, nogil=True)
def _likeliest(
    nodes: np.ndarray, logprobs: np.ndarray, counts: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, parents, log-probabilities and begins; of equal nodes the first, so parents come with their children."""
    begins = np.zeros(len(counts) + 1, np.int64)
    for tree in range(len(counts)):
        begins[tree + 1] = begins[tree] + min(counts[tree], most)
    tokens, parents = np.empty(begins[-1], np.int32), np.empty(begins[-1], np.int32)
    given_parent = np.empty(begins[-1], np.float32)
    for tree in range(len(counts)):
        count = counts[tree]
        keep = np.ones(count, np.bool_)
        if count > most:
            keep[np.argsort(-logprobs[tree, 1, :count], kind="mergesort")[most:]] = False
        own = slice(begins[tree], begins[tree + 1])
        tokens[own] = nodes[tree, 0, :count][keep]
        parents[own] = renumbered(nodes[tree, 1, :count], keep)
        given_parent[own] = logprobs[tree, 0, :count][keep]
    return tokens, parents, given_parent, begins
