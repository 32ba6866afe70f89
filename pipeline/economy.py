"""What a replica learns about drafting: what a level takes, what it brings, and what time is worth.

Time is priced at the rate at which the replica has been emitting tokens (Dinkelbach 1967: the best ratio of sums
maximises tokens - rate x seconds), so a level, a node and a round compete on one scale.
"""

import numpy as np
from numba import njit

from pipeline.budget import StepTimes
from pipeline.forest import Forest
from pipeline.resting import Resting

COVERED = np.array([0.05, 0.25, 0.5, 0.75, 0.9])  # bounds of the kinds of nodes: how surely retrieval goes on from them
THRESHOLDS = np.linspace(0.0, 1.0, 21)
_FIRST_SURPLUS = 0.6 * (1.0 - THRESHOLDS) ** 2  # what half-sure draft models show; soon overruled
_SURPLUS_WEIGHT = 0.05  # of a round in the moving average
_RATE_DECAY = 0.95
_TIME_DECAY = 0.98
_FIRST_LEVEL = 0.1  # of a target's step, until levels are timed
# Of each kind of nodes, as multiples of `gains_of`.
_FIRST_WORTH = np.array([1.0, 1.2, 1.2, 1.0, 0.5, 0.1])
_FIRST_TOKENS = 10.0  # weight of that guess
_GAIN_DECAY = 0.99  # of a round
_MOST_COVERED = 0.5  # nodes that retrieval covers further teach nothing about the draft model
_MOST_OFF = 2.0  # what took longer than expected counts as this many times the estimate at most
_WARM_UP = 2  # levels
_RIDGE = 1e-6  # keeps the least squares solvable
EXPLORE_EVERY = 50  # rounds; one slot is then drafted for in full


class LevelTimes:
    """Seconds of a draft level of n rows, a + b n, by least squares over what was seen, newer counting more."""

    def __init__(self, times: StepTimes) -> None:
        self._weight, self._rows, self._squares = 0.0, 0.0, 0.0  # sums over levels of 1, n and n * n,
        self._seconds, self._products = 0.0, 0.0  # of their seconds, and of those times n
        self._num_levels = 0
        self._was_off = False
        for rows, seconds in zip((1, 64), times(np.array([1, 64])).tolist(), strict=True):
            self._add(rows, _FIRST_LEVEL * seconds)

    def observe(self, num_rows: int, seconds: float) -> None:
        """A level of so many rows took so long. One far above the estimate is believed if the last one was, too: a
        machine may pause, and first calls compile."""
        self._num_levels += 1
        if self._num_levels <= _WARM_UP:
            return
        fixed, slope = self.line()
        most = _MOST_OFF * (fixed + slope * num_rows)
        is_off = seconds > most
        if is_off and not self._was_off:
            seconds = most
        self._was_off = is_off
        self._add(num_rows, seconds)

    def __call__(self, num_rows: np.ndarray) -> np.ndarray:
        """Seconds for each row count, [n] -> [n]."""
        fixed, slope = self.line()
        seconds: np.ndarray = fixed + slope * num_rows
        return seconds

    def _add(self, num_rows: int, seconds: float) -> None:
        decay = _TIME_DECAY if self._num_levels else 1.0
        self._weight = decay * self._weight + 1.0
        self._rows = decay * self._rows + num_rows
        self._squares = decay * self._squares + num_rows * num_rows
        self._seconds = decay * self._seconds + seconds
        self._products = decay * self._products + num_rows * seconds

    def line(self) -> tuple[float, float]:
        """a [seconds] and b [seconds a row]."""
        weight, squares = self._weight + _RIDGE, self._squares + _RIDGE
        determinant = weight * squares - self._rows * self._rows
        fixed = (squares * self._seconds - self._rows * self._products) / determinant
        slope = (weight * self._products - self._rows * self._seconds) / determinant
        if slope < 0 or fixed < 0:  # too little seen to tell them apart
            return self._seconds / self._weight, 0.0
        return fixed, slope


class Economy:
    """What a replica has learned about the worth of drafting.

    Args:
        times: of the target's passes.
        depth: most levels.
    """

    def __init__(self, times: StepTimes, depth: int) -> None:
        self.times = times
        self.level_times = LevelTimes(times)
        self.resting = Resting(times)
        self.surplus = np.tile(_FIRST_SURPLUS, (depth, 1))  # [levels, thresholds], see `gains_of`
        self._expected = np.full(len(_FIRST_WORTH), _FIRST_TOKENS)
        self._gained = _FIRST_TOKENS * _FIRST_WORTH
        self._new = np.zeros((2, len(_FIRST_WORTH)))  # the same since `begin_round`
        self._own = np.zeros(depth)  # gains by level in rounds that computed it lately, and
        self._later = np.zeros(depth)  # what the levels behind it then were worth beyond their time
        self._tokens = 0.0  # emitted lately, and
        self._plain_tokens = 0.0  # what plain decoding would have in the same time with as many slots
        self._rows = 0.0  # verified lately, and
        self._roots = 0.0  # how many of them were roots
        self._num_rounds = 0
        self._drafting = 0.0  # seconds that this round's levels took

    def rate(self, num_slots: int) -> float:
        """Tokens a second with so many slots: plain decoding's, times what rounds have been worth beside it lately.

        It is what time costs, and never less than plain decoding's: where speculation loses, time can be had back.
        """
        plain = self._plain_rate(num_slots)
        return plain * max(self._tokens / self._plain_tokens, 1.0) if self._plain_tokens else plain

    def _plain_rate(self, num_slots: int) -> float:
        return num_slots / float(self.times(np.array([num_slots]))[0])

    def row_seconds(self, num_slots: int) -> float:
        """What one more row adds to a verification pass of the usual size."""
        rows = num_slots * (self._rows / self._roots if self._roots else 1.0)
        few, many = self.times(np.array([rows, 2 * rows + 1]))
        return float(many - few) / (rows + 1)

    @property
    def worth(self) -> np.ndarray:
        """[kinds] what expanding nodes brought, as multiples of `gains_of`, which knows of the draft model alone.

        Where something was retrieved the draft model brings less that is new, but tells right from wrong.
        """
        worth: np.ndarray = self._gained / self._expected
        return worth

    def observe_gains(self, expected: np.ndarray, gained: np.ndarray) -> None:
        """Drafting in some slots was expected to gain tokens beyond their rows' price, and gained so many.

        Args:
            expected: [n, kinds] sums of `gains_of`, in each slot not all 0; gained: [n].
        """
        believed = expected * np.maximum(self.worth, 0.1)
        shares = believed / believed.sum(axis=1, keepdims=True)
        self._new += [expected.sum(axis=0), gained @ shares]

    def options(self) -> np.ndarray:
        """[levels] what a level is worth for the levels that may follow it, as a share of its own gains."""
        return self._later / np.maximum(self._own, 1e-9)

    def observe_levels(self, gains: np.ndarray, nets: np.ndarray) -> None:
        """A round's drafting has ended.

        Args:
            gains, nets: [levels] of the levels computed, tokens, and those less the level's time; 0 for the others.
        """
        later = np.concatenate([np.cumsum(nets[::-1])[::-1][1:], [0.0]])
        computed = gains > 0
        self._own[computed] = _RATE_DECAY * self._own[computed] + gains[computed]
        self._later[computed] = _RATE_DECAY * self._later[computed] + np.maximum(later[computed], 0.0)

    def begin_round(self, num_views: int) -> int | None:
        """Learns what earlier rounds have told that they gained.

        Returns:
            The view that is drafted for in full in this round, if any: what is never tried is never learned.
        """
        known = self._new[0] > 0
        self._expected[known] = _GAIN_DECAY * self._expected[known] + self._new[0, known]
        self._gained[known] = np.maximum(_GAIN_DECAY * self._gained[known] + self._new[1, known], 0.0)
        self._new[:] = 0.0
        self._num_rounds += 1
        number, is_left = divmod(self._num_rounds, EXPLORE_EVERY)
        return number % num_views if num_views and not is_left else None

    def observe_level(self, num_rows: int, seconds: float) -> None:
        """A level of the draft model took so long."""
        self._drafting += seconds
        self.level_times.observe(num_rows, seconds)

    def observe_trees(self, trees: Forest, num_expanded: np.ndarray) -> None:
        """Learns what drafted children are worth from a round's fused and calibrated trees.

        Args:
            num_expanded: [levels] nodes that the draft model expanded; those of which no child is left were worth
                nothing.
        """
        sums, counts, seen = _surpluses(trees.parents, trees.scores, trees.evidence, trees.begins, len(self.surplus))
        counts += np.maximum(num_expanded - seen, 0)
        for level in np.flatnonzero(counts):
            weight = 1.0 - (1.0 - _SURPLUS_WEIGHT) ** min(counts[level], 8)
            self.surplus[level] += weight * (sums[level] / counts[level] - self.surplus[level])

    def observe_round(self, num_slots: int, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A round without prefill verified so many rows, one of each slot a root, and emitted so many tokens."""
        seconds = min(seconds, _MOST_OFF * (float(self.times(np.array([num_rows]))[0]) + self._drafting))
        self._drafting = 0.0
        plain_tokens = seconds * self._plain_rate(num_slots)
        is_resting = self.resting.is_resting
        self.resting.observe(num_tokens, plain_tokens)
        if is_resting:
            return
        self._tokens = _RATE_DECAY * self._tokens + num_tokens
        self._plain_tokens = _RATE_DECAY * self._plain_tokens + plain_tokens
        self._rows = _RATE_DECAY * self._rows + num_rows
        self._roots = _RATE_DECAY * self._roots + num_slots


@njit(cache=True, nogil=True)
def gains_of(values: np.ndarray, surplus: np.ndarray, row_tokens: float) -> np.ndarray:
    """Expected tokens from expanding nodes of a level beyond what their children's rows cost, [F].

    For a node of value v it is v E[sum over children of max(p - row_tokens / v, 0)].

    Args:
        values: [F] float32 probability that the node is reached; row_tokens: price of a row.
        surplus: [thresholds] that expectation at each of `THRESHOLDS`.
    """
    gains, last = np.zeros(len(values)), len(THRESHOLDS) - 1
    for i in range(len(values)):
        threshold = np.float32(row_tokens) / max(values[i], np.float32(1e-9))
        if threshold > THRESHOLDS[last]:
            continue
        at = min(np.searchsorted(THRESHOLDS, threshold, side="right") - 1, last - 1)
        slope = (surplus[at + 1] - surplus[at]) / (THRESHOLDS[at + 1] - THRESHOLDS[at])
        gains[i] = values[i] * (slope * (threshold - THRESHOLDS[at]) + surplus[at])
    return gains


@njit(cache=True, nogil=True)
def net_tokens(tokens: np.ndarray, parents: np.ndarray, scores: np.ndarray, choices: np.ndarray, price: float) -> float:
    """Accepted tokens less the price of all rows, of a tree's nodes that are likelier accepted than a row costs.

    Args:
        choices: [A + 1] int64 the target's choices along the accepted path.
    """
    values = np.empty(len(tokens), np.float64)
    node, place, net = -1, 0, 0.0
    for i in range(len(tokens)):
        values[i] = scores[i] * (values[parents[i]] if parents[i] >= 0 else 1.0)
        if values[i] <= price:
            continue
        net -= price
        if parents[i] == node and place < len(choices) and tokens[i] == choices[place]:
            node, place, net = i, place + 1, net + 1.0
    return net


@njit(cache=True, nogil=True)
def net_tokens_of(
    tokens: np.ndarray,
    parents: np.ndarray,
    scores: np.ndarray,
    begins: np.ndarray,
    choices: np.ndarray,
    choice_begins: np.ndarray,
    price: float,
) -> np.ndarray:
    """[B] `net_tokens` of all trees of a forest."""
    nets = np.empty(len(begins) - 1)
    for tree in range(len(nets)):
        own = slice(begins[tree], begins[tree + 1])
        along = choices[choice_begins[tree] : choice_begins[tree + 1]]
        nets[tree] = net_tokens(tokens[own], parents[own], scores[own], along, price)
    return nets


@njit(cache=True, nogil=True)
def _surpluses(
    parents: np.ndarray, scores: np.ndarray, evidence: np.ndarray, begins: np.ndarray, num_levels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What expanded nodes of a forest teach.

    Returns:
        [levels, thresholds] sums over drafted children of max(p - threshold, 0), [levels] nodes that they come from,
        and [levels] all that the trees show to have been expanded.
    """
    sums = np.zeros((num_levels, len(THRESHOLDS)))
    counts, seen = np.zeros(num_levels), np.zeros(num_levels)
    for tree in range(len(begins) - 1):
        first, size = begins[tree], begins[tree + 1] - begins[tree]
        covered = np.zeros(size + 1)  # of the root and each node: its retrieved children's scores
        is_expanded = np.zeros(size + 1, np.bool_)
        levels = np.zeros(size + 1, np.int64)
        is_own = np.zeros(size, np.bool_)
        for i in range(size):
            above = parents[first + i] + 1
            levels[i + 1] = levels[above] + 1
            is_retrieved = (evidence[first + i, 1:] > 0).any()
            if is_retrieved:
                covered[above] += scores[first + i]
            if evidence[first + i, 0] > 0:
                is_expanded[above] = True
                is_own[i] = not is_retrieved
        for node in range(size + 1):
            if is_expanded[node] and levels[node] < num_levels:
                seen[levels[node]] += 1
                counts[levels[node]] += covered[node] < _MOST_COVERED
        for i in range(size):
            above = parents[first + i] + 1
            if is_own[i] and levels[above] < num_levels and covered[above] < _MOST_COVERED:
                share = max(1.0 - covered[above], 1e-3)
                sums[levels[above]] += np.maximum(scores[first + i] / share - THRESHOLDS, 0.0)
    return sums, counts, seen
