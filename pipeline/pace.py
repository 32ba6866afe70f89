"""How far a draft model goes: which nodes a level expands, and when the next level is not worth its time.

A level of the draft model costs measured time and brings candidates worth expected tokens. Expanding a node brings what
its children are worth beyond the cost of verifying them, and what the levels behind it may bring; where retrieval goes
on already it brings less that is new, but tells right from wrong (`pipeline.economy`).
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import numpy as np
from numba import njit

from pipeline.draft_forest import GrowingForest
from pipeline.economy import COVERED, Economy, gains_of, net_tokens_of
from pipeline.forest import Forest
from pipeline.tree import TokenTree
from pipeline.verify import Outcome


class Pace(Protocol):
    """Decides level by level what the draft model expands."""

    @property
    def reads_root(self) -> bool:
        """Whether the draft model's distribution after the root is wanted."""
        ...

    def expand(self, level: int, forest: GrowingForest) -> np.ndarray:
        """Which nodes of the forest's frontier to expand, [F] bool; a tree of which none is grows no further."""
        ...

    def meanwhile(self) -> None:
        """A level is being computed; what can be done before it is read."""
        ...

    def took(self, num_rows: int, seconds: float) -> None:
        """A level has been computed."""
        ...


class FullPace:
    """Everything to the full depth, as EAGLE-2 does.

    Args:
        wanted: the views that are drafted for; None for all.
        meanwhile: done while levels are computed.
    """

    def __init__(
        self,
        reads_root: bool = False,
        wanted: frozenset[int] | None = None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        self.reads_root = reads_root
        self._wanted = wanted
        self._meanwhile = meanwhile

    def expand(self, level: int, forest: GrowingForest) -> np.ndarray:
        if self._wanted is None:
            return np.ones(len(forest.frontier), np.bool_)
        return np.isin(forest.frontier_views, list(self._wanted))

    def meanwhile(self) -> None:
        self._meanwhile()

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
        is_beside: ask for it while a level is computed, too.
    """

    reads_root: ClassVar[bool] = False

    def __init__(
        self,
        economy: Economy,
        retrieved: Sequence[TokenTree],
        newly_found: Callable[[], Sequence[TokenTree] | None] = lambda: None,
        *,
        is_beside: bool = False,
    ) -> None:
        self._economy = economy
        self.learn(retrieved)
        self._newly_found = newly_found
        self._is_beside = is_beside
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

    def expand(self, level: int, forest: GrowingForest) -> np.ndarray:
        if level:
            self._look()
        economy = self._economy
        fixed, per_row = economy.level_times.line()
        keep, gain, net = _chosen(
            forest.places_in(self._retrieved),
            forest.frontier_views,
            np.exp(forest.frontier_logprobs),
            *(self._covered, economy.worth, economy.surplus[level], economy.options()[level], self._expected),
            *(self._row_tokens, self._rate, fixed, per_row, -1 if self._explored is None else self._explored),
        )
        self.gains[level], self.nets[level], self.num_expanded[level] = gain, net, np.count_nonzero(keep)
        return keep

    def meanwhile(self) -> None:
        if self._is_beside:
            self._look()

    def _look(self) -> None:
        if (found := self._newly_found()) is not None:
            self.learn(found)

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


@njit(cache=True, nogil=True)
def _covered(parents: np.ndarray, scores: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """[T + B] sum of the scores of the children of each tree's root and of each of its nodes, tree by tree."""
    covered = np.zeros(len(parents) + len(begins) - 1)
    for tree in range(len(begins) - 1):
        for i in range(begins[tree], begins[tree + 1]):
            covered[begins[tree] + tree + parents[i] + 1] += scores[i]
    return covered


@njit(cache=True, nogil=True)
def _chosen(
    places: np.ndarray,
    views: np.ndarray,
    values: np.ndarray,
    covered: np.ndarray,
    worth: np.ndarray,
    surplus: np.ndarray,
    option: float,
    expected: np.ndarray,
    row_tokens: float,
    rate: float,
    level_fixed: float,
    level_row: float,
    explored: int,
) -> tuple[np.ndarray, float, float]:
    """What a level expands: the best nodes, as many as maximise what they gain beyond the level's time.

    Args:
        places: [F] of each node among what is `covered`, -1 for none; values: [F] float32 probability of its path.
        worth: [kinds]; surplus: [thresholds] of the level; see `Economy`.
        option: what the level is worth for those that may follow it, as a share of its gains.
        expected: [views, kinds] grows by the gains of what is expanded.
        explored: view of which all is expanded.

    Returns:
        [F] bool; what the level gains, and how much of it is left beyond its time: 0 if it is not worth it.
    """
    num_nodes = len(values)
    kinds, alone = np.zeros(num_nodes, np.int64), gains_of(values, surplus, row_tokens)
    gains = np.empty(num_nodes)
    for i in range(num_nodes):
        sure = covered[places[i]] if places[i] >= 0 else 0.0
        while kinds[i] < len(COVERED) and COVERED[kinds[i]] < sure:
            kinds[i] += 1
        gains[i] = alone[i] * worth[kinds[i]]
    order = np.argsort(-gains, kind="mergesort")  # stable
    best, best_net, gain, total = -1, 0.0, 0.0, 0.0
    for i in range(num_nodes):
        total += gains[order[i]]
        cost = rate * (level_fixed + level_row * (i + 1))
        if total * (1.0 + option) - cost > best_net:
            best, best_net, gain = i, total * (1.0 + option) - cost, total
    keep = np.zeros(num_nodes, np.bool_)
    for i in range(best + 1):
        keep[order[i]] = True
    for i in range(num_nodes):
        keep[i] |= views[i] == explored
        if keep[i]:
            expected[views[i], kinds[i]] += alone[i]
    net = gain - rate * (level_fixed + level_row * (best + 1)) if best >= 0 else 0.0
    return keep, gain, net
