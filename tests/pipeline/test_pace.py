"""The pace of drafting: a level is computed where its children are worth its time, and nowhere else."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.budget import StepTimes
from pipeline.draft_forest import GrowingForest
from pipeline.economy import EXPLORE_EVERY, THRESHOLDS, Economy, LevelTimes, net_tokens
from pipeline.forest import Forest, fuse
from pipeline.pace import EconomicPace, FullPace
from pipeline.tree import EMPTY_TREE, TokenTree
from pipeline.verify import Outcome
from tests.pipeline.toys import path_of, trees

FLAT = StepTimes((1, 64, 128), (0.04, 0.041, 0.042))  # rows cost almost nothing
STEEP = StepTimes((1, 2, 4, 8, 16, 32, 64), tuple(0.002 * n for n in (1, 2, 4, 8, 16, 32, 64)))  # nothing but rows


def roots(num_views: int) -> GrowingForest:
    return GrowingForest([3] * num_views, 8, 8)


def grown(logprobs: Sequence[float]) -> GrowingForest:
    """A tree whose root was expanded; tokens are 0, 1, ..."""
    forest = roots(1)
    forest.grow(np.array([logprobs], np.float32), np.arange(len(logprobs))[None])
    return forest


def economy_with(times: StepTimes, level_seconds: float, row_seconds: float = 0.0) -> Economy:
    economy = Economy(times, depth=3)
    for rows in (1, 8, 16) * 100:
        economy.level_times.observe(rows, level_seconds + row_seconds * rows)
    return economy


def test_a_free_level_is_always_worth_it() -> None:
    pace = EconomicPace(economy_with(FLAT, 1e-6), [EMPTY_TREE] * 2)
    assert pace.expand(0, roots(2)).tolist() == [True, True]


def test_a_level_that_takes_as_long_as_the_target_is_not() -> None:
    assert not EconomicPace(economy_with(FLAT, 0.05), [EMPTY_TREE]).expand(0, roots(1)).any()


def test_where_every_row_costs_a_plain_step_nothing_is_drafted() -> None:
    economy = economy_with(STEEP, 1e-4)
    assert not EconomicPace(economy, [EMPTY_TREE] * 8).expand(0, roots(8)).any()


def test_a_slot_whose_retrieval_is_sure_is_not_drafted_for() -> None:
    sure = TokenTree.of([5, 6], [-1, 0], "context", [0.98, 0.98])
    pace = EconomicPace(economy_with(FLAT, 2e-3, row_seconds=3e-3), [sure, EMPTY_TREE])
    assert pace.expand(0, roots(2)).tolist() == [False, True]


def test_a_path_that_retrieval_continues_is_not_expanded() -> None:
    """The likelier of two nodes is covered from there on by what the context holds."""
    tree = grown([np.log(0.55), np.log(0.4)])
    found = TokenTree.of([0, 9], [-1, 0], "context", [0.4, 0.99])
    for retrieved, expanded in ((found, [False, True]), (EMPTY_TREE, [True, True])):
        pace = EconomicPace(economy_with(FLAT, 2e-3, row_seconds=3e-3), [retrieved])
        assert pace.expand(1, tree).tolist() == expanded


def test_what_is_found_while_a_level_is_computed_stops_the_next() -> None:
    tree = grown([np.log(0.55)])
    sure = TokenTree.of([0, 9], [-1, 0], "corpus", [0.9, 0.99])
    answers = [[sure]]
    pace = EconomicPace(economy_with(FLAT, 2e-3), [EMPTY_TREE], lambda: answers.pop() if answers else None)
    assert pace.expand(0, roots(1)).all(), "nothing is asked before the first level"
    assert not pace.expand(1, tree).any()
    assert not pace.expand(2, tree).any(), "and stays known"


def test_unlikely_nodes_are_left_where_rows_cost() -> None:
    economy = economy_with(StepTimes((1, 2, 4, 8, 16, 32, 64), np.linspace(0.04, 0.12, 7).tolist()), 1e-5)
    tree = grown([np.log(0.9), np.log(0.001)])
    assert EconomicPace(economy, [EMPTY_TREE]).expand(1, tree).tolist() == [True, False]


def test_one_slot_is_explored_now_and_then() -> None:
    economy = economy_with(FLAT, 0.05)
    drafted = [np.flatnonzero(EconomicPace(economy, [EMPTY_TREE] * 3).expand(0, roots(3))).tolist() for _ in range(160)]
    assert [len(chosen) for chosen in drafted].count(1) == 160 // EXPLORE_EVERY
    assert {chosen[0] for chosen in drafted if chosen} == {0, 1, 2}


@settings(deadline=None)
@given(st.lists(trees(max_nodes=8), min_size=1, max_size=3))
def test_surplus_is_what_drafted_children_are_worth_beyond_a_threshold(some: list[TokenTree]) -> None:
    """Against loops over one tree."""
    tree = fuse(some)
    economy = Economy(FLAT, depth=2)
    before = economy.surplus.copy()
    economy.observe_trees(Forest.of([tree]), np.array([9, 7]))
    sums, counts, seen = np.zeros_like(before), np.zeros(2), np.zeros(2)
    for parent in range(-1, len(tree)):
        children = [node for node in range(len(tree)) if tree.parents[node] == parent]
        level = 0 if parent < 0 else len(path_of(tree, parent))
        found = [c for c in children if (tree.evidence[c, 1:] > 0).any()]
        drafted = [c for c in children if tree.evidence[c, 0] > 0]
        covered = sum(float(tree.scores[c]) for c in found)
        if not drafted or level > 1:
            continue
        seen[level] += 1
        if covered >= 0.5:
            continue
        counts[level] += 1
        for child in set(drafted) - set(found):
            sums[level] += np.maximum(float(tree.scores[child]) / (1 - covered) - THRESHOLDS, 0)
    counts += np.array([9, 7]) - seen  # of which no child was kept
    for level in range(2):
        weight = 1 - 0.95 ** min(counts[level], 8)
        mean = sums[level] / counts[level] if counts[level] else before[level]
        np.testing.assert_allclose(economy.surplus[level], before[level] + weight * (mean - before[level]), atol=1e-4)


def test_level_times_are_learned() -> None:
    times = LevelTimes(FLAT)
    for rows in (1, 8, 30, 8, 64) * 80:
        times.observe(rows, 0.003 + 0.0002 * rows)
    np.testing.assert_allclose(times(np.array([1, 20, 100])), [0.0032, 0.007, 0.023], rtol=0.02)


def test_one_paused_level_changes_little_and_two_are_believed() -> None:
    times = LevelTimes(FLAT)
    for _ in range(100):
        times.observe(8, 0.005)
    times.observe(8, 10.0)
    assert times(np.array([8]))[0] == pytest.approx(0.005, rel=0.1)
    times.observe(8, 10.0)
    assert times(np.array([8]))[0] > 0.1


def test_levels_of_one_size_are_no_cheaper_when_smaller_or_dearer_when_larger() -> None:
    times = LevelTimes(FLAT)
    for _ in range(400):
        times.observe(8, 0.005)
    assert times(np.array([8]))[0] == pytest.approx(0.005, rel=0.05)
    assert bool((times(np.array([1, 8, 64])) > 0).all())


def test_the_rate_is_that_of_recent_rounds() -> None:
    economy = Economy(FLAT, depth=2)
    assert economy.rate(4) == pytest.approx(4 / float(FLAT(np.array([4]))[0]))
    for _ in range(100):
        economy.observe_round(num_slots=4, num_rows=20, num_tokens=6, seconds=0.05)
    assert economy.rate(4) == pytest.approx(120)


def test_time_never_costs_less_than_plain_decoding_would_make_of_it() -> None:
    """Where speculation loses, its own low rate would make drafting look cheap, and it would go on losing."""
    economy = Economy(FLAT, depth=2)
    plain = economy.rate(4)
    for _ in range(100):
        economy.observe_round(num_slots=4, num_rows=20, num_tokens=4, seconds=1.2 * 4 / plain)
    assert economy.rate(4) == pytest.approx(plain)


def test_the_rate_follows_the_slots_at_once() -> None:
    """When a job ends few slots are left, whose tokens take longer: what was earned with many is no price for them."""
    economy = Economy(FLAT, depth=2)
    for _ in range(100):
        economy.observe_round(num_slots=32, num_rows=64, num_tokens=48, seconds=0.05)
    assert economy.rate(1) == pytest.approx(960 / 32, rel=0.05)


@given(trees(max_nodes=8), st.lists(st.integers(0, 4), min_size=1, max_size=5), st.floats(0.0, 1.0))
def test_net_tokens_are_those_accepted_less_the_rows_price(tree: TokenTree, choices: list[int], price: float) -> None:
    """Against paths node by node."""
    kept = right = 0
    for node in range(len(tree)):
        path = [node]
        while tree.parents[path[0]] >= 0:
            path.insert(0, int(tree.parents[path[0]]))
        if np.prod(tree.scores[path], dtype=np.float64) > price:
            kept += 1
            right += tree.tokens[path].tolist() == choices[: len(path)]
    got = net_tokens(tree.tokens, tree.parents, tree.scores, np.array(choices), price)
    assert got == pytest.approx(right - price * kept, abs=1e-5)


def test_what_drafting_gained_is_learned_by_how_surely_retrieval_goes_on() -> None:
    economy = economy_with(FLAT, 1e-6)
    found = TokenTree.of([5], [-1], "context", [0.6])
    fused = TokenTree.of([5, 7], [-1, -1], "draft", [0.3, 0.6])
    for _ in range(400):
        pace = EconomicPace(economy, [found, EMPTY_TREE])
        pace.expand(0, roots(2))
        # The draft model knows better than what was retrieved, and is wrong where nothing was.
        pace.observe(Forest.of([fused, fused]), Outcome.of([np.array([7, 1]), np.array([9])]))
    assert economy.worth[3] > 1.5
    assert economy.worth[0] < 0.1


def test_the_full_pace_expands_everything_wanted() -> None:
    forest = GrowingForest([2, 0, 2], 4, 2)
    forest.grow(np.array([[-0.5, -np.inf], [-0.5, -1.0]], np.float32), np.array([[1, 2], [3, 4]]))
    assert FullPace().expand(1, forest).tolist() == [True, True, True]
    assert FullPace(wanted=frozenset([2])).expand(1, forest).tolist() == [False, True, True]


def test_a_level_is_worth_what_the_levels_behind_it_bring() -> None:
    economy = Economy(FLAT, depth=3)
    for _ in range(200):
        economy.observe_levels(np.array([2.0, 1.5, 0.0]), np.array([-0.5, 1.0, 0.0]))
    assert economy.options() == pytest.approx([0.5, 0.0, 0.0])
    for _ in range(200):
        economy.observe_levels(np.array([2.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0]))
    assert economy.options() == pytest.approx([0.0, 0.0, 0.0], abs=1e-3)
