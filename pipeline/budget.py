"""How many tree nodes a round verifies: the set with the most expected tokens a second, over all slots of the batch.

A node's value is the probability that it is accepted; a round of T rows takes the measured time t(T). Values fall
along every path, so the n best nodes of all trees are always whole trees, and the best n is found by trying every n.
It can be 0. In a round with prefill, whose time is lost anyway, rows are priced at the rate of a round without.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit

from pipeline.forest import Forest
from pipeline.tree import TokenTree

_GRID = np.array([1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512])
_SMOOTHING = 0.05
_START = 2.0  # rounds that what was measured at start counts for: it knows neither contexts nor what surrounds a pass
_MOST_OFF = 1.5  # times the estimate that a round counts as at most
_FAR = 0.25  # of what a round teaches about its own size, it teaches about all sizes: longer contexts slow them all


class StepTimes:
    """Measured seconds of a forward pass of T rows, by interpolation over a grid; refined by every round.

    Args:
        rows: measured row counts, ascending.
        seconds: their times; beyond the last the slope of the last two goes on.
    """

    def __init__(self, rows: Sequence[int], seconds: Sequence[float]) -> None:
        known = np.maximum.accumulate(np.asarray(seconds, np.float64))
        half = len(rows) // 2  # over the upper half: one slow measurement must not make the slope vanish
        slope = (known[-1] - known[half - 1]) / (rows[-1] - rows[half - 1]) if half else known[-1] / rows[-1]
        self._seconds = np.interp(_GRID, rows, known) + slope * np.maximum(_GRID - rows[-1], 0)
        self._seen = np.full(len(_GRID), _START)  # rounds near each

    def observe(self, rows: int, seconds: float) -> None:
        """Learns from one round, from the first ones most.

        A round far off the estimate, such as one in which the machine was paused, counts in part.
        """
        expected = float(self(np.array([rows]))[0])
        change = min(seconds / expected, _MOST_OFF) - 1.0
        nearness = np.clip(1.0 - np.abs(np.log2(_GRID / min(rows, _GRID[-1]))), _FAR, 1.0)
        self._seen += nearness
        weight = nearness * np.maximum(_SMOOTHING, 1.0 / self._seen)
        self._seconds = np.maximum.accumulate(self._seconds * (1.0 + weight * change))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Seconds for each row count, [n] int -> [n] float64."""
        slope = (self._seconds[-1] - self._seconds[-2]) / (_GRID[-1] - _GRID[-2])
        seconds: np.ndarray = np.interp(rows, _GRID, self._seconds) + slope * np.maximum(rows - _GRID[-1], 0)
        return seconds


def select(
    trees: Sequence[TokenTree],
    budget: int | None,
    times: StepTimes | None,
    other_rows: int = 0,
    other_seconds: float = 0.0,
) -> Forest:
    """The nodes of each tree that this round verifies.

    Args:
        trees: one a decoding slot.
        budget: most nodes of each slot; None maximises expected tokens a second of rounds without prefill by `times`.
        times: step-time model, needed without a budget.
        other_rows: rows this round computes anyway besides the decoding slots' roots (prefill).
        other_seconds: what this round takes anyway besides the forward pass (drafting, bookkeeping).
    """
    forest = Forest.of(trees)
    if forest.num_nodes == 0:
        return forest
    values = forest.values()
    if budget is not None:
        return forest.pruned(_best(values, forest.begins, budget))
    assert times is not None
    order = np.argsort(-values, kind="stable")  # of equal nodes the parent comes first
    ranked = values[order]
    nodes = np.arange(len(ranked) + 1)
    tokens = len(forest) + np.concatenate([[0.0], np.cumsum(ranked)])
    rates = tokens / (times(len(forest) + nodes) + other_seconds)
    best = int(np.argmax(rates))
    if other_rows:  # prefill has to be paid in any case: a node must earn its own time at the rate of other rounds
        best = int(np.argmax(tokens - rates[best] * times(other_rows + len(forest) + nodes)))
    keep = np.zeros(len(ranked), np.bool_)
    keep[order[:best]] = True
    return forest.pruned(keep)


@njit(cache=True, nogil=True)
def _best(values: np.ndarray, begins: np.ndarray, budget: int) -> np.ndarray:
    """[T] bool the `budget` likeliest nodes of each tree; of equal nodes the parent comes first."""
    keep = np.ones(len(values), np.bool_)
    for tree in range(len(begins) - 1):
        begin, end = begins[tree], begins[tree + 1]
        if end - begin > budget:
            order = np.argsort(-values[begin:end], kind="mergesort")  # stable
            for i in order[budget:]:
                keep[begin + i] = False
    return keep
