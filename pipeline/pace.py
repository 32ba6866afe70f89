"""How far a draft model goes: which nodes a level expands, and when the next level is not worth its time.

A level of the draft model costs measured time and brings candidates worth expected tokens. Expanding a node brings what
its children are worth beyond the cost of verifying them, and only as far as retrieval does not cover the node already.
Time is priced at the rate at which the replica has been emitting tokens (Dinkelbach 1967: the best ratio of sums
maximises tokens - rate x seconds), so a level, a node and a round compete on one scale.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np

from pipeline.budget import StepTimes
from pipeline.draft_tree import GrowingTree
from pipeline.tree import TokenTree, node_depths, places_in

_THRESHOLDS = np.linspace(0.0, 1.0, 21)
_FIRST_SURPLUS = 0.6 * (1.0 - _THRESHOLDS) ** 2  # what half-sure draft models show; soon overruled
_SURPLUS_WEIGHT = 0.05  # of a round in the moving average
_RATE_DECAY = 0.95
_TIME_DECAY = 0.98
_FIRST_LEVEL = 0.1  # of a target's step, until levels are timed
_MOST_COVERED = 0.5  # nodes that retrieval covers further teach nothing about the draft model
_MOST_OFF = 2.0  # what took longer than expected counts as this many times the estimate at most
_WARM_UP = 2  # levels
_EXPLORE_EVERY = 50  # rounds; one slot is then drafted for in full


class Pace(Protocol):
    """Decides level by level what the draft model expands."""

    @property
    def reads_root(self) -> bool:
        """Whether the draft model's distribution after the root is wanted."""
        ...

    def expand(self, level: int, trees: Mapping[int, GrowingTree]) -> Mapping[int, np.ndarray]:
        """Which nodes of each tree's frontier to expand, [F] bool; a tree left out grows no further."""
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


class LevelTimes:
    """Seconds of a draft level of n rows, a + b n, by least squares over what was seen, newer counting more."""

    def __init__(self, times: StepTimes) -> None:
        self._normal = np.zeros((2, 2))
        self._right = np.zeros(2)
        self._num_levels = 0
        self._was_off = False
        for rows, seconds in zip((1, 64), times(np.array([1, 64])).tolist(), strict=True):
            row = np.array([1.0, rows])
            self._normal += np.outer(row, row)
            self._right += _FIRST_LEVEL * seconds * row

    def observe(self, num_rows: int, seconds: float) -> None:
        """A level of so many rows took so long. One far above the estimate is believed if the last one was, too: a
        machine may pause, and first calls compile."""
        self._num_levels += 1
        if self._num_levels <= _WARM_UP:
            return
        most = _MOST_OFF * float(self(np.array([num_rows]))[0])
        is_off = seconds > most
        if is_off and not self._was_off:
            seconds = most
        self._was_off = is_off
        row = np.array([1.0, num_rows])
        self._normal = _TIME_DECAY * self._normal + np.outer(row, row)
        self._right = _TIME_DECAY * self._right + seconds * row

    def __call__(self, num_rows: np.ndarray) -> np.ndarray:
        """Seconds for each row count, [n] -> [n]."""
        fixed, slope = np.linalg.solve(self._normal + 1e-6 * np.eye(2), self._right)
        mean = self._right[0] / self._normal[0, 0]
        if slope < 0 or fixed < 0:  # too little seen to tell them apart
            return np.full(len(num_rows), mean)
        seconds: np.ndarray = fixed + slope * num_rows
        return seconds


class Economy:
    """What a replica has learned about the worth of drafting; hands each round its pace.

    Args:
        times: of the target's passes.
        depth: most levels.
    """

    def __init__(self, times: StepTimes, depth: int) -> None:
        self.times = times
        self.level_times = LevelTimes(times)
        self.surplus = np.tile(_FIRST_SURPLUS, (depth, 1))  # [levels, thresholds], see `gains`
        self._tokens = 0.0
        self._seconds = 0.0
        self._rows = 0.0
        self._weight = 0.0
        self._num_rounds = 0
        self._drafting = 0.0  # seconds that this round's levels took

    def rate(self, num_slots: int) -> float:
        """Tokens a second lately; before the first round that of plain decoding."""
        if self._seconds == 0:
            return num_slots / float(self.times(np.array([num_slots]))[0])
        return self._tokens / self._seconds

    def row_seconds(self, num_slots: int) -> float:
        """What one more row adds to a verification pass of the usual size."""
        rows = self._rows / self._weight if self._weight else num_slots
        few, many = self.times(np.array([rows, 2 * rows + 1]))
        return float(many - few) / (rows + 1)

    def gains(self, level: int, values: np.ndarray, row_tokens: float) -> np.ndarray:
        """Expected tokens from expanding nodes at a level beyond what their children's rows cost, [F].

        For a node of value v it is v E[sum over children of max(p - row_tokens / v, 0)].

        Args:
            values: [F] probability that the node is reached and not covered; row_tokens: price of a row.
        """
        thresholds = row_tokens / np.maximum(values, 1e-9)
        gains: np.ndarray = values * np.interp(thresholds, _THRESHOLDS, self.surplus[level], right=0.0)
        return gains

    def round(
        self, retrieved: Sequence[TokenTree], newly_found: Callable[[], Sequence[TokenTree] | None] = lambda: None
    ) -> "EconomicPace":
        """The pace of the next round.

        Args:
            retrieved: what is known already of each view's retrieved tree, calibrated.
            newly_found: the same between levels, None if nothing more has come.
        """
        self._num_rounds += 1
        explored = None
        if retrieved and self._num_rounds % _EXPLORE_EVERY == 0:
            explored = (self._num_rounds // _EXPLORE_EVERY) % len(retrieved)
        return EconomicPace(self, retrieved, newly_found, explored)

    def observe_level(self, num_rows: int, seconds: float) -> None:
        """A level of the draft model took so long."""
        self._drafting += seconds
        self.level_times.observe(num_rows, seconds)

    def observe_trees(self, trees: Sequence[TokenTree], num_expanded: np.ndarray) -> None:
        """Learns what drafted children are worth from this round's fused and calibrated trees.

        Args:
            num_expanded: [levels] nodes that the draft model expanded; those of which no child is left were worth
                nothing.
        """
        sums = np.zeros_like(self.surplus)
        counts = np.zeros(len(self.surplus))
        seen = np.zeros(len(self.surplus))
        for tree in trees:
            if len(tree):
                _surpluses(tree, sums, counts, seen)
        counts += np.maximum(num_expanded - seen, 0)
        for level in np.flatnonzero(counts):
            weight = 1.0 - (1.0 - _SURPLUS_WEIGHT) ** min(counts[level], 8)
            self.surplus[level] += weight * (sums[level] / counts[level] - self.surplus[level])

    def observe_round(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A round without prefill verified so many rows and emitted so many tokens."""
        seconds = min(seconds, _MOST_OFF * (float(self.times(np.array([num_rows]))[0]) + self._drafting))
        self._drafting = 0.0
        self._tokens = _RATE_DECAY * self._tokens + num_tokens
        self._seconds = _RATE_DECAY * self._seconds + seconds
        self._rows = _RATE_DECAY * self._rows + num_rows
        self._weight = _RATE_DECAY * self._weight + 1.0


class EconomicPace:
    """One round's pace: a level takes the nodes whose gain is more than their share of the level's time.

    Attributes:
        num_expanded: [levels] nodes that were chosen so far.
    """

    reads_root: ClassVar[bool] = False

    def __init__(
        self,
        economy: Economy,
        retrieved: Sequence[TokenTree],
        newly_found: Callable[[], Sequence[TokenTree] | None],
        explored: int | None,
    ) -> None:
        self._economy = economy
        self._retrieved = retrieved
        self._newly_found = newly_found
        self._explored = explored
        self._rate = economy.rate(len(retrieved))
        self._row_tokens = self._rate * economy.row_seconds(len(retrieved))
        self.num_expanded = np.zeros(len(economy.surplus))

    def expand(self, level: int, trees: Mapping[int, GrowingTree]) -> Mapping[int, np.ndarray]:
        if not trees:
            return {}
        if level and (found := self._newly_found()) is not None:
            self._retrieved = found
        values = [self._uncovered(index, tree) for index, tree in trees.items()]
        gains = self._economy.gains(level, np.concatenate(values), self._row_tokens)
        order = np.argsort(-gains, kind="stable")
        rows = np.arange(1, len(gains) + 1)
        net = np.cumsum(gains[order]) - self._rate * self._economy.level_times(rows)
        best = int(np.argmax(net))
        keep = np.zeros(len(gains), np.bool_)
        if net[best] > 0:
            keep[order[: best + 1]] = True
        parts = np.split(keep, np.cumsum([len(value) for value in values])[:-1])
        chosen = dict(zip(trees, parts, strict=True))
        if self._explored in chosen:
            chosen[self._explored][:] = True
        self.num_expanded[level] = sum(part.sum() for part in chosen.values())
        return {index: part for index, part in chosen.items() if part.any()}

    def took(self, num_rows: int, seconds: float) -> None:
        self._economy.observe_level(num_rows, seconds)

    def _uncovered(self, index: int, tree: GrowingTree) -> np.ndarray:
        """[F] probability that a node of the frontier is reached and that nothing retrieved goes on from it rightly."""
        found = self._retrieved[index]
        if len(found) == 0:
            return tree.frontier_values
        if len(tree.tokens) == 0:  # the root
            return np.array([max(1.0 - float(found.scores[found.parents < 0].sum()), 0.0)])
        covered = np.zeros(len(found) + 1)
        np.add.at(covered, found.parents + 1, found.scores)
        places = places_in(found.tokens, found.parents, tree.tokens, tree.parents)[tree.frontier + 1]
        share = np.where(places >= -1, covered[np.maximum(places, -1) + 1], 0.0)
        return tree.frontier_values * np.maximum(1.0 - share, 0.0)


def _surpluses(tree: TokenTree, sums: np.ndarray, counts: np.ndarray, seen: np.ndarray) -> None:
    """Adds each expanded node's sum over drafted children of max(p - threshold, 0) to its level's row.

    Args:
        counts, seen: [levels] get the nodes that teach, and all that the tree shows to have been expanded.
    """
    drafted = tree.evidence[:, 0] > 0
    retrieved = (tree.evidence[:, 1:] > 0).any(axis=1)
    groups = tree.parents + 1
    covered = np.bincount(groups[retrieved], tree.scores[retrieved], len(tree) + 1)
    own = drafted & ~retrieved
    share = np.maximum(1.0 - covered[groups[own]], 1e-3)
    over = np.maximum(tree.scores[own, None] / share[:, None] - _THRESHOLDS, 0.0)  # [children, thresholds]
    depths = np.concatenate([[0], node_depths(tree.parents)])
    expanded = np.unique(groups[drafted])
    expanded = expanded[depths[expanded] < len(sums)]
    np.add.at(seen, depths[expanded], 1)
    teaches = expanded[covered[expanded] < _MOST_COVERED]
    by_group = np.zeros((len(tree) + 1, len(_THRESHOLDS)))
    np.add.at(by_group, groups[own], over)
    np.add.at(sums, depths[teaches], by_group[teaches])
    np.add.at(counts, depths[teaches], 1)
