"""Draw-once verification: walk each tree along the target's own choices.

At every node the target's next token is computed once (argmax, or a Gumbel-max sample). The walk descends while a child
carries that token; the first choice no child carries is the bonus token. The emitted tokens do not depend on the tree
at all, which is why the output is the target's own for any drafter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from pipeline.forest import Forest


@dataclass(frozen=True, slots=True)
class Outcome:
    """What verification showed of B trees.

    Attributes:
        choices: [C] int64 the target's choices along each tree's accepted path, its tokens and the bonus, tree by tree.
        begins: [B + 1] int64; a tree that was not verified has no choices.
    """

    choices: np.ndarray
    begins: np.ndarray

    @staticmethod
    def of(choices: Sequence[np.ndarray]) -> "Outcome":
        """From the choices of each tree, [A + 1] integers, or none."""
        parts = [np.empty(0, np.int64), *choices]
        return Outcome(np.concatenate(parts).astype(np.int64), np.cumsum([len(part) for part in parts], dtype=np.int64))

    def taken(self, order: Sequence[int]) -> "Outcome":
        """The same of other trees: each one's number among these, or -1 if it was not verified."""
        if list(order) == list(range(len(order))):
            begins = self.begins[: len(order) + 1]
            return Outcome(self.choices[: begins[-1]], begins)
        none = self.choices[:0]
        return Outcome.of([self.choices[self.begins[i] : self.begins[i + 1]] if i >= 0 else none for i in order])


@dataclass(frozen=True, slots=True)
class Walks:
    """What verification accepted of B trees, side by side.

    Attributes:
        nodes: [A] int32 the accepted nodes of all trees, numbered within each.
        begins: [B + 1] int64 where each tree's begin.
        sources: [A] int8 who was surest of each node, index into `SOURCES`.
        outcome: the choices along them; none of a tree that was not verified.
    """

    nodes: np.ndarray
    begins: np.ndarray
    sources: np.ndarray
    outcome: Outcome


def walk_forest(trees: Forest, choices: np.ndarray, rows: np.ndarray) -> Walks:
    """Walks each of B trees.

    Args:
        choices: [M] int64 of all logits rows.
        rows: [B] int64 the row of each tree's root, those of its nodes follow; -1 for a tree that is not verified.
    """
    columns = (trees.tokens, trees.parents, trees.evidence, trees.begins)
    accepted, begins, sources, along, along_begins = _walks(*columns, choices, rows)
    return Walks(accepted, begins, sources, Outcome(along, along_begins))


@njit(cache=True, nogil=True)
def walk(tokens: np.ndarray, parents: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """Accepted nodes of one tree, from the root down.

    Args:
        tokens: [N] int32 token ids of the tree's nodes.
        parents: [N] int32, -1 for children of the root; parents before children, siblings distinct.
        choices: [N + 1] int64 the target's choice after the root (first) and after each node.

    Returns:
        [A] int32 node indices. The emitted tokens are `choices[0]`, then `choices[a + 1]` for each accepted node a.
    """
    accepted = np.empty(len(tokens), np.int32)
    num_accepted = 0
    node = -1
    for i in range(len(tokens)):
        if parents[i] == node and tokens[i] == choices[node + 1]:
            accepted[num_accepted] = i
            num_accepted += 1
            node = i
    return accepted[:num_accepted]


@njit(cache=True, nogil=True)
def _walks(
    tokens: np.ndarray,
    parents: np.ndarray,
    evidence: np.ndarray,
    begins: np.ndarray,
    choices: np.ndarray,
    rows: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The columns of `Walks`, then of its outcome."""
    num_trees = len(rows)
    accepted, sources = np.empty(len(tokens), np.int32), np.empty(len(tokens), np.int8)
    along, along_ends = np.empty(len(tokens) + num_trees, np.int64), np.zeros(num_trees + 1, np.int64)
    ends = np.zeros(num_trees + 1, np.int64)
    at, at_along = 0, 0
    for tree in range(num_trees):
        if rows[tree] >= 0:
            own = slice(begins[tree], begins[tree + 1])
            path = walk(tokens[own], parents[own], choices[rows[tree] : rows[tree] + 1 + own.stop - own.start])
            along[at_along] = choices[rows[tree]]
            at_along += 1
            for node in path:
                accepted[at], sources[at] = node, np.argmax(evidence[begins[tree] + node])
                along[at_along] = choices[rows[tree] + 1 + node]
                at += 1
                at_along += 1
        ends[tree + 1], along_ends[tree + 1] = at, at_along
    return accepted[:at], ends, sources[:at], along[:at_along], along_ends
