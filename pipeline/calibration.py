"""One scale for all sources: p(accepted | parent accepted) of every node of a fused tree, learned while it is used.

The children of one node and "none of them" share a probability of one, by a conditional logit (McFadden 1974): a
child's strength is linear in what each source says of it, that of "none" in what each source leaves over. With the
first weights, a tree of one source keeps that source's own estimates. Verification tells the target's next token after
every accepted node, so candidates that were not verified teach as much as those that were, and nothing need be
explored.
"""

import json
from pathlib import Path

import numpy as np
from numba import njit

from pipeline.forest import Forest
from pipeline.tree import SOURCES
from pipeline.verify import Outcome

_NUM_SOURCES = len(SOURCES)
# A child: per source log of its estimate, that it proposed the child, that it proposed only siblings; then the draft's
# log estimate and proposal for a sampled request, the draft's and retrieval's proposal by log depth, agreement.
NUM_CHILD = 3 * _NUM_SOURCES + 5
# None of them: per source log of what it leaves over, that it proposed any; a draft for a sampled request; log depth.
NUM_NONE = 2 * _NUM_SOURCES + 2
NUM_WEIGHTS = NUM_CHILD + NUM_NONE
_LEFT = np.float32(0.02)  # least share that a source leaves over
_RATE = 0.03
_START = 4.0  # sum of squared gradients that the first weights are worth
_KEPT = 0.9995  # of past squared gradients a round, so that a job's later text still teaches
_PULL = 2e-4  # towards the first weights, a round
_PRIOR = Path(__file__).with_suffix(".json")


def first_weights() -> np.ndarray:
    """[NUM_WEIGHTS] float32 under which a single source's estimates stay what they are."""
    weights = np.zeros(NUM_WEIGHTS, np.float32)
    weights[:_NUM_SOURCES] = 1.0
    weights[NUM_CHILD : NUM_CHILD + _NUM_SOURCES] = 1.0
    return weights


def shipped_weights() -> np.ndarray:
    """[NUM_WEIGHTS] float32 fitted on recorded runs, see `benchmarks.calibration`."""
    return np.asarray(json.loads(_PRIOR.read_text("utf-8"))["weights"], np.float32)


class Calibration:
    """The scale and what it has learned.

    Args:
        weights: [NUM_WEIGHTS] float32 to start from, and to return to where nothing is seen; the shipped ones if None.
    """

    def __init__(self, weights: np.ndarray | None = None) -> None:
        self._prior = shipped_weights() if weights is None else weights.astype(np.float32)
        self.weights = self._prior.copy()
        self._squares = np.full(NUM_WEIGHTS, _START, np.float32)

    def scored(self, trees: Forest, is_sampled: np.ndarray) -> Forest:
        """The trees with calibrated scores; siblings sum to less than one.

        Args:
            is_sampled: [B] bool, whether the request of each tree is.
        """
        if trees.num_nodes == 0:
            return trees
        columns = (trees.parents, trees.evidence, trees.begins)
        return trees.with_scores(_all_probabilities(*columns, is_sampled, self.weights))

    def observe(self, trees: Forest, outcome: Outcome, is_sampled: np.ndarray) -> None:
        """Learns from one round.

        Args:
            trees: all candidates, verified or not; is_sampled: as in `scored`.
        """
        columns = (trees.tokens, trees.parents, trees.evidence, trees.begins, outcome.choices, outcome.begins)
        _learn_all(*columns, is_sampled, self.weights, self._squares, self._prior)


@njit(cache=True, nogil=True)
def _describe_child(row: np.ndarray, evidence: np.ndarray, total: np.ndarray, depth: int, is_sampled: bool) -> None:
    """Writes a child's features into `row`, [NUM_CHILD]. evidence, total: [sources] its own, and its siblings' too."""
    row[:] = 0.0
    agreeing = 0
    retrieved = False
    for source in range(evidence.shape[0]):
        if evidence[source] > 0:
            row[source] = np.log(evidence[source])
            row[_NUM_SOURCES + source] = 1.0
            agreeing += 1
            retrieved |= source > 0
        elif total[source] > 0:
            row[2 * _NUM_SOURCES + source] = 1.0
    rest = 3 * _NUM_SOURCES
    if evidence[0] > 0:
        if is_sampled:
            row[rest] = row[0]
            row[rest + 1] = 1.0
        row[rest + 2] = np.log(np.float32(depth))
    if retrieved:
        row[rest + 3] = np.log(np.float32(depth))
    row[rest + 4] = max(agreeing - 1, 0)


@njit(cache=True, nogil=True)
def _describe_none(row: np.ndarray, total: np.ndarray, depth: int, is_sampled: bool) -> None:
    """Writes the features of "none of them" into `row`, [NUM_NONE]."""
    row[:] = 0.0
    for source in range(total.shape[0]):
        if total[source] > 0:
            row[source] = np.log(max(np.float32(1.0) - total[source], _LEFT))
            row[_NUM_SOURCES + source] = 1.0
    row[2 * _NUM_SOURCES] = 1.0 if is_sampled and total[0] > 0 else 0.0
    row[2 * _NUM_SOURCES + 1] = np.log(np.float32(depth))


@njit(cache=True, nogil=True)
def _totals(parents: np.ndarray, evidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Evidence of all children of the root (first) and of each node, [N + 1, sources]; depth of those, [N + 1]."""
    n = len(parents)
    total = np.zeros((n + 1, evidence.shape[1]), np.float32)
    depths = np.ones(n + 1, np.int32)
    for i in range(n):
        for source in range(evidence.shape[1]):
            total[parents[i] + 1, source] += evidence[i, source]
        depths[i + 1] = depths[parents[i] + 1] + 1
    return total, depths


@njit(cache=True, nogil=True)
def _dot(row: np.ndarray, weights: np.ndarray, begin: int) -> float:
    total = 0.0
    for k in range(len(row)):
        total += row[k] * weights[begin + k]
    return total


@njit(cache=True, nogil=True)
def probabilities(parents: np.ndarray, evidence: np.ndarray, is_sampled: bool, weights: np.ndarray) -> np.ndarray:
    """[N] float32 p(accepted | parent accepted).

    Args:
        parents: [N]; evidence: [N, sources], as of a `TokenTree`; weights: [NUM_WEIGHTS].
    """
    n = len(parents)
    total, depths = _totals(parents, evidence)
    row = np.empty(NUM_CHILD, np.float32)
    rest = np.empty(NUM_NONE, np.float32)
    strengths = np.empty(n, np.float32)
    sums = np.zeros(n + 1, np.float32)
    for i in range(n):
        group = parents[i] + 1
        if sums[group] == 0:
            _describe_none(rest, total[group], depths[group], is_sampled)
            sums[group] = np.exp(_dot(rest, weights, NUM_CHILD))
        _describe_child(row, evidence[i], total[group], depths[group], is_sampled)
        strengths[i] = np.exp(min(_dot(row, weights, 0), 30.0))
        sums[group] += strengths[i]
    for i in range(n):
        strengths[i] /= sums[parents[i] + 1]
    return strengths


@njit(cache=True, nogil=True)
def _all_probabilities(
    parents: np.ndarray, evidence: np.ndarray, begins: np.ndarray, is_sampled: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """`probabilities` of all trees of a forest, [T]."""
    shares = np.empty(len(parents), np.float32)
    for tree in range(len(begins) - 1):
        own = slice(begins[tree], begins[tree + 1])
        shares[own] = probabilities(parents[own], evidence[own], is_sampled[tree], weights)
    return shares


@njit(cache=True, nogil=True)
def _learn_all(
    tokens: np.ndarray,
    parents: np.ndarray,
    evidence: np.ndarray,
    begins: np.ndarray,
    choices: np.ndarray,
    choice_begins: np.ndarray,
    is_sampled: np.ndarray,
    weights: np.ndarray,
    squares: np.ndarray,
    prior: np.ndarray,
) -> None:
    """`_learn` from each tree in turn that has nodes and was verified."""
    for tree in range(len(begins) - 1):
        own = slice(begins[tree], begins[tree + 1])
        along = choices[choice_begins[tree] : choice_begins[tree + 1]]
        if begins[tree + 1] > begins[tree] and len(along):
            _learn(tokens[own], parents[own], evidence[own], along, is_sampled[tree], weights, squares, prior)


@njit(cache=True, nogil=True)
def _learn(
    tokens: np.ndarray,
    parents: np.ndarray,
    evidence: np.ndarray,
    choices: np.ndarray,
    is_sampled: bool,
    weights: np.ndarray,
    squares: np.ndarray,
    prior: np.ndarray,
) -> None:
    """One AdaGrad step (Duchi et al. 2011) on the log-loss of the groups along `choices`."""
    gradient = np.zeros(NUM_WEIGHTS, np.float32)
    _accumulate(tokens, parents, evidence, choices, is_sampled, weights, gradient)
    for k in range(NUM_WEIGHTS):
        squares[k] = max(_KEPT * squares[k], _START) + gradient[k] * gradient[k]
        step = gradient[k] + _PULL * (weights[k] - prior[k])
        weights[k] -= _RATE * step / np.sqrt(squares[k])


@njit(cache=True, nogil=True)
def _accumulate(
    tokens: np.ndarray,
    parents: np.ndarray,
    evidence: np.ndarray,
    choices: np.ndarray,
    is_sampled: bool,
    weights: np.ndarray,
    gradient: np.ndarray,
) -> float:
    """Adds the gradient of the groups along `choices` to `gradient`, [NUM_WEIGHTS]; returns their log-loss."""
    n = len(tokens)
    total, depths = _totals(parents, evidence)
    shares = probabilities(parents, evidence, is_sampled, weights)
    row = np.empty(NUM_CHILD, np.float32)
    rest = np.empty(NUM_NONE, np.float32)
    node, loss = -1, 0.0
    for choice in choices:
        right, none, has_children = -1, np.float32(1.0), False
        for i in range(node + 1, n):
            if parents[i] == node:
                has_children = True
                is_right = tokens[i] == choice
                right = i if is_right else right
                none -= shares[i]
                _describe_child(row, evidence[i], total[node + 1], depths[node + 1], is_sampled)
                for k in range(NUM_CHILD):
                    gradient[k] += row[k] * (shares[i] - is_right)
        if not has_children:
            break
        _describe_none(rest, total[node + 1], depths[node + 1], is_sampled)
        for k in range(NUM_NONE):
            gradient[NUM_CHILD + k] += rest[k] * (none - (right < 0))
        loss -= np.log(max(shares[right] if right >= 0 else none, 1e-6))
        if right < 0:
            break
        node = right
    return loss
