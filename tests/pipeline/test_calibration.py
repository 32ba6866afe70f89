"""The scale: siblings share one probability, one source keeps its own estimates, and what is shown is learned."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.calibration import (
    NUM_CHILD,
    NUM_WEIGHTS,
    Calibration,
    _accumulate,
    first_weights,
    probabilities,
    shipped_weights,
)
from pipeline.forest import Forest, fuse
from pipeline.tree import EMPTY_TREE, SOURCES, TokenTree
from pipeline.verify import Outcome
from tests.pipeline.toys import trees

bounded = settings(deadline=None, max_examples=100)
DRAFT, CONTEXT, CORPUS = (SOURCES.index(name) for name in ("draft", "context", "corpus"))
weight_vectors = st.lists(st.floats(-2, 2, width=32), min_size=NUM_WEIGHTS, max_size=NUM_WEIGHTS).map(
    lambda values: np.array(values, np.float32)
)


def children_of(tree: TokenTree, parent: int) -> list[int]:
    return [node for node in range(len(tree)) if tree.parents[node] == parent]


def depth_of(tree: TokenTree, node: int) -> int:
    return 0 if node < 0 else 1 + depth_of(tree, int(tree.parents[node]))


def naive(tree: TokenTree, is_sampled: bool, weights: np.ndarray) -> list[float]:
    """The conditional logit, written out as the module's comments state it."""
    num = len(SOURCES)
    scores = [0.0] * len(tree)
    for parent in range(-1, len(tree)):
        children = children_of(tree, parent)
        if not children:
            continue
        depth = math.log(depth_of(tree, parent) + 1)
        total = [sum(float(tree.evidence[c, s]) for c in children) for s in range(num)]
        none = 0.0
        for s in range(num):
            if total[s] > 0:
                none += weights[NUM_CHILD + s] * math.log(max(1 - total[s], 0.02)) + weights[NUM_CHILD + num + s]
        none += weights[NUM_CHILD + 2 * num] * (is_sampled and total[0] > 0)
        none += weights[NUM_CHILD + 2 * num + 1] * depth
        strengths = []
        for child in children:
            z = 0.0
            proposers = [s for s in range(num) if tree.evidence[child, s] > 0]
            for s in proposers:
                z += weights[s] * math.log(tree.evidence[child, s]) + weights[num + s]
            z += sum(weights[2 * num + s] for s in range(num) if total[s] > 0 and s not in proposers)
            if 0 in proposers:
                sampled = weights[3 * num] * math.log(tree.evidence[child, 0]) + weights[3 * num + 1]
                z += is_sampled * sampled + weights[3 * num + 2] * depth
            z += weights[3 * num + 3] * depth * any(s > 0 for s in proposers)
            z += weights[3 * num + 4] * (len(proposers) - 1)
            strengths.append(math.exp(min(z, 30.0)))
        for child, strength in zip(children, strengths, strict=True):
            scores[child] = strength / (math.exp(none) + sum(strengths))
    return scores


@bounded
@given(st.lists(trees(max_nodes=8), min_size=1, max_size=3), st.booleans(), weight_vectors)
def test_scores_are_the_conditional_logit_written_out(
    some: list[TokenTree], is_sampled: bool, weights: np.ndarray
) -> None:
    tree = fuse(some)
    got = probabilities(tree.parents, tree.evidence, is_sampled, weights)
    assert got.tolist() == pytest.approx(naive(tree, is_sampled, weights), rel=2e-3, abs=1e-5)
    for parent in range(-1, len(tree)):
        assert got[children_of(tree, parent)].sum() <= 1.0 + 1e-5


@bounded
@given(st.lists(st.floats(0.015625, 0.25, width=32), min_size=1, max_size=3), st.sampled_from(SOURCES))
def test_a_single_source_keeps_its_estimates_at_first(estimates: list[float], source: str) -> None:
    tree = TokenTree.of(range(len(estimates)), [-1] * len(estimates), source, estimates)
    forest = Forest.of([tree])
    scored = Calibration(first_weights()).scored(forest, np.array([False]))
    assert scored.scores.tolist() == pytest.approx(estimates, rel=1e-3)
    assert scored.evidence is forest.evidence and scored.tokens is forest.tokens


@settings(deadline=None, max_examples=30)
@given(trees(max_nodes=8), st.booleans(), weight_vectors, st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_the_gradient_is_that_of_the_loss(
    tree: TokenTree, is_sampled: bool, weights: np.ndarray, choices: list[int]
) -> None:
    """Against central differences."""
    columns = (tree.tokens, tree.parents, tree.evidence, np.array(choices, np.int32), is_sampled)
    gradient = np.zeros(NUM_WEIGHTS, np.float32)
    _accumulate(*columns, weights, gradient)

    def loss(shifted: np.ndarray) -> float:
        scores, node, total = naive(tree, is_sampled, shifted), -1, 0.0
        for choice in choices:
            children = children_of(tree, node)
            right = [child for child in children if tree.tokens[child] == choice]
            if not children:
                break
            value = scores[right[0]] if right else 1 - sum(scores[child] for child in children)
            assume(value > 1e-6)  # else 1 - p is mostly rounding, and its differences are
            total -= math.log(value)
            if not right:
                break
            node = right[0]
        return total

    for k in range(NUM_WEIGHTS):
        step = np.zeros(NUM_WEIGHTS)
        step[k] = 1e-4
        slope = (loss(weights.astype(float) + step) - loss(weights.astype(float) - step)) / 2e-4
        assert gradient[k] == pytest.approx(slope, rel=2e-2, abs=2e-2)


def observe(calibration: Calibration, tree: TokenTree, choices: list[int]) -> None:
    calibration.observe(Forest.of([tree]), Outcome.of([np.array(choices, np.int64)]), np.array([False]))


def test_what_verification_shows_is_learned() -> None:
    """The context is right nine times in ten where the draft model says otherwise, and claims five in ten."""
    tree = fuse([TokenTree.of([1], [-1], "draft", [0.6]), TokenTree.of([2], [-1], "context", [0.5])])
    calibration, random = Calibration(first_weights()), np.random.default_rng(0)
    for _ in range(1500):
        observe(calibration, tree, [2 if random.random() < 0.9 else 1, 5])
    scores = calibration.scored(Forest.of([tree]), np.array([False])).scores
    assert scores[1] == pytest.approx(0.9, abs=0.06)
    assert scores[0] == pytest.approx(0.1, abs=0.06)


def test_candidates_that_were_not_reached_teach_nothing() -> None:
    tree = TokenTree.of([1, 2], [-1, 0], "corpus", [0.5, 0.5])
    calibration = Calibration(first_weights())
    before = calibration.weights.copy()
    observe(calibration, EMPTY_TREE, [1])
    observe(calibration, tree, [])
    assert calibration.weights.tolist() == before.tolist()
    observe(calibration, tree, [9])
    depth = NUM_CHILD + 2 * len(SOURCES) + 1
    assert calibration.weights[depth] == before[depth], "only the root's children were tried, at log depth 0"
    assert calibration.weights[CORPUS] != before[CORPUS]
    assert calibration.weights[[DRAFT, CONTEXT]].tolist() == before[[DRAFT, CONTEXT]].tolist()


def test_the_shipped_weights_fit_this_layout() -> None:
    assert shipped_weights().shape == (NUM_WEIGHTS,)
    assert bool(np.isfinite(shipped_weights()).all())
