"""How far a draft model goes: which nodes a level expands, and when the next level is not worth its time.

A level of the draft model costs measured time and brings candidates worth expected tokens. Expanding a node brings what
its children are worth beyond the cost of verifying them, and what the levels behind it may bring; where retrieval goes
on already it brings less that is new, but tells right from wrong (`pipeline.economy`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
from numba import njit

from pipeline.draft_tree import GrowingTree
from pipeline.economy import COVERED, Economy, net_tokens_of
from pipeline.forest import Forest
from pipeline.tree import TokenTree, places_in
from pipeline.verify import Outcome


class Pace(Protocol):
    """Decides level by level what the draft model expands."""

    @property
    def reads_root(self) -> bool:
        """Whether the draft model's distribution after the root is wanted."""
        ...

    def expand(self, level: int, trees: Mapping[int, GrowingTree]) -> Mapping[int, np.ndarray]:
        """Which nodes of each tree's frontier to expand, [F] bool, some at least; a tree left out grows no further.

        Args:
            trees: by view, those that have a frontier.
        """
        ...

    def took(self, num_rows: int, seconds: float) -> None:
        """A level has been computed."""
        ...


class FullPace:
    """Everything to the full depth, as EAGLE-2 does, for the views that `wanted` names; None for all."""

    def __init__(self, reads_root: bool = False, wanted: frozenset[int] | None = None) -> None:
        self.reads_root = reads_root
        self._wanted = wanted

    def expand(self, level: int, trees: Mapping[int, GrowingTree]) -> Mapping[int, np.ndarray]:
        return {
            index: np.ones(len(tree.frontier), np.bool_)
            for index, tree in trees.items()
            if self._wanted is None or index in self._wanted
        }

    def took(self, num_rows: int, seconds: float) -> None:
        """It does not matter."""


class EconomicPace:
    """One round's pace: a level takes the nodes whose gain is more than their share of the level's time.

    Attributes:
        num_expanded: [levels] nodes that were chosen so far.
        gains, nets: [levels] what they are worth in tokens, and what is left of that beyond the level's time.

    Args:
        economy: what was learned so far.
        retrieved: what is known already of each view's retrieved tree, calibrated.
        newly_found: the same between levels, None if nothing more has come.
    """

    reads_root: ClassVar[bool] = False

    def __init__(
        self,
        economy: Economy,
        retrieved: Sequence[TokenTree],
        newly_found: Callable[[], Sequence[TokenTree] | None] = lambda: None,
    ) -> None:
        self._economy = economy
        self.learn(retrieved)
        self._newly_found = newly_found
        self._explored = economy.begin_round(len(retrieved))
        self._rate = economy.rate(len(retrieved))
        self._row_tokens = self._rate * economy.row_seconds(len(retrieved))
        self.num_expanded = np.zeros(len(economy.surplus))
        self.gains = np.zeros(len(economy.surplus))
        self.nets = np.zeros(len(economy.surplus))
        self._expected = np.zeros((len(retrieved), len(economy.worth)))  # by view and kind, see `Economy.observe_gains`

    def learn(self, retrieved: Sequence[TokenTree]) -> None:
        """More was retrieved: all that is known of it now, calibrated, one tree a view."""
        self._retrieved = Forest.of(retrieved)
        self._covered = _covered(self._retrieved.parents, self._retrieved.scores, self._retrieved.begins)

    def expand(self, level: int, trees: Mapping[int, GrowingTree]) -> Mapping[int, np.ndarray]:
        if not trees:
            return {}
        if level and (found := self._newly_found()) is not None:
            self.learn(found)
        views = np.fromiter(trees, np.int64, len(trees))
        sizes = [len(tree.frontier) for tree in trees.values()]
        if level:
            values = np.exp(np.concatenate([tree.frontier_logprobs for tree in trees.values()]))
            covered = np.concatenate([self._covered_of(i, tree) for i, tree in trees.items()])
        else:  # the roots
            values, covered = np.ones(len(trees), np.float32), self._covered[self._retrieved.begins[views] + views]
        kinds = np.searchsorted(COVERED, covered)
        alone = self._economy.gains(level, values, self._row_tokens)
        gains = alone * self._economy.worth[kinds]
        order = np.argsort(-gains, kind="stable")
        rows = np.arange(1, len(gains) + 1)
        worth, cost = np.cumsum(gains[order]), self._rate * self._economy.level_times(rows)
        net = worth * (1.0 + self._economy.options()[level]) - cost
        best = int(np.argmax(net))
        keep = np.zeros(len(gains), np.bool_)
        if net[best] > 0:
            keep[order[: best + 1]] = True
            self.gains[level], self.nets[level] = worth[best], worth[best] - cost[best]
        begins = np.cumsum([0, *sizes])
        parts = {index: keep[begins[i] : begins[i + 1]] for i, index in enumerate(trees)}
        if self._explored in parts:
            parts[self._explored][:] = True  # in `keep`, too
        np.add.at(self._expected, (np.repeat(views, sizes)[keep], kinds[keep]), alone[keep])
        self.num_expanded[level] = keep.sum()
        is_chosen = np.logical_or.reduceat(keep, begins[:-1]).tolist()
        return {index: part for (index, part), is_any in zip(parts.items(), is_chosen, strict=True) if is_any}

    def took(self, num_rows: int, seconds: float) -> None:
        self._economy.observe_level(num_rows, seconds)

    def observe(self, trees: Forest, outcome: Outcome) -> None:
        """What became of the views' fused trees: what drafting gained, against the retrieved trees alone."""
        drafted = np.flatnonzero(self._expected.any(axis=1) & (np.diff(outcome.begins) > 0))
        if not len(drafted):
            return
        with_draft, without = (
            net_tokens_of(
                *(each.tokens, each.parents, each.scores, each.begins, outcome.choices, outcome.begins),
                self._row_tokens,
            )
            for each in (trees, self._retrieved)
        )
        self._economy.observe_gains(self._expected[drafted], (with_draft - without)[drafted])

    def _covered_of(self, view: int, tree: GrowingTree) -> np.ndarray:
        """[F] probability that something retrieved goes on rightly from each node of a frontier below the root."""
        found = self._retrieved
        begin, end = int(found.begins[view]), int(found.begins[view + 1])
        if begin == end:
            return np.zeros(len(tree.frontier))
        nodes = found.tokens[begin:end], found.parents[begin:end]
        covered = self._covered[begin + view : end + view + 1]
        return _covered_at(*nodes, covered, tree.tokens, tree.parents, tree.frontier)


@njit(cache=True, nogil=True)
def _covered(parents: np.ndarray, scores: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """[T + B] sum of the scores of the children of each tree's root and of each of its nodes, tree by tree."""
    covered = np.zeros(len(parents) + len(begins) - 1)
    for tree in range(len(begins) - 1):
        for i in range(begins[tree], begins[tree + 1]):
            covered[begins[tree] + tree + parents[i] + 1] += scores[i]
    return covered


@njit(cache=True, nogil=True)
def _covered_at(
    found_tokens: np.ndarray,
    found_parents: np.ndarray,
    covered: np.ndarray,
    tokens: np.ndarray,
    parents: np.ndarray,
    frontier: np.ndarray,
) -> np.ndarray:
    """What `covered` says of the found node with the same path as each node of the frontier, 0 where there is none."""
    places = places_in(found_tokens, found_parents, tokens, parents)
    found = np.zeros(len(frontier))
    for i in range(len(frontier)):
        place = places[frontier[i] + 1]
        if place >= -1:
            found[i] = covered[place + 1]
    return found
