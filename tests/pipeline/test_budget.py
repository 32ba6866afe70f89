"""The budget takes the nodes most likely to be accepted, as many as pay, and always whole paths."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.budget import StepTimes, select
from pipeline.tree import TokenTree, path_values
from tests.pipeline.toys import path_of, trees

bounded = settings(deadline=None, max_examples=150)
some_trees = st.lists(trees(max_nodes=10), min_size=1, max_size=4)


@st.composite
def step_times(draw: st.DrawFn) -> StepTimes:
    """Flat, then a step, then a slope: the kinds that real machines show."""
    rows = (1, 2, 4, 8, 16, 32, 64)
    steps = draw(st.lists(st.floats(0.0, 0.02), min_size=len(rows), max_size=len(rows)))
    return StepTimes(rows, np.cumsum([0.01, *steps[1:]]).tolist())


def all_paths(tree: TokenTree) -> set[tuple[int, ...]]:
    return {path_of(tree, node) for node in range(len(tree))}


def assert_whole_paths(chosen: TokenTree, tree: TokenTree) -> None:
    kept = all_paths(chosen)
    assert len(kept) == len(chosen)
    assert kept <= all_paths(tree)
    assert all(path[:-1] in kept for path in kept if len(path) > 1)


def value_of(tree: TokenTree) -> float:
    return float(path_values(tree.parents, tree.scores).astype(np.float64).sum())


def tokens_and_seconds(chosen: list[TokenTree], times: StepTimes, other_rows: int = 0) -> tuple[float, float]:
    """What a round promises, every slot's bonus token and the nodes likely to be accepted, and what it takes."""
    rows = other_rows + len(chosen) + sum(len(tree) for tree in chosen)
    return len(chosen) + sum(value_of(tree) for tree in chosen), float(times(np.array([rows]))[0])


def rate(chosen: list[TokenTree], times: StepTimes) -> float:
    """Expected tokens a second of a round without prefill."""
    tokens, seconds = tokens_and_seconds(chosen, times)
    return tokens / seconds


def closed_subsets(tree: TokenTree) -> list[np.ndarray]:
    """Every set of nodes that holds the parents of its nodes, as keep masks [N]."""
    masks = (np.array(bits, np.bool_) for bits in itertools.product((False, True), repeat=len(tree)))
    return [
        mask
        for mask in masks
        if all(mask[parent] for parent, kept in zip(tree.parents, mask, strict=True) if kept and parent >= 0)
    ]


@bounded
@given(some_trees, st.integers(0, 12))
def test_a_fixed_budget_takes_the_best_nodes_of_each_slot(some: list[TokenTree], budget: int) -> None:
    for chosen, tree in zip(select(some, budget, None), some, strict=True):
        assert_whole_paths(chosen, tree)
        assert len(chosen) == min(budget, len(tree))
        best = np.sort(path_values(tree.parents, tree.scores))[::-1][:budget]
        assert value_of(chosen) == pytest.approx(float(best.astype(np.float64).sum()), rel=1e-6, abs=1e-30)


@settings(deadline=None, max_examples=60)
@given(st.lists(trees(max_nodes=5, vocabulary=3), min_size=1, max_size=2), step_times(), st.integers(0, 40))
def test_no_other_choice_of_nodes_is_faster(some: list[TokenTree], times: StepTimes, other_rows: int) -> None:
    """Against every set of whole paths of every slot."""
    chosen = select(some, None, times, other_rows)
    for part, tree in zip(chosen, some, strict=True):
        assert_whole_paths(part, tree)
    values = [path_values(tree.parents, tree.scores).astype(np.float64) for tree in some]
    choices = []  # tokens, seconds without and with the prefill
    for masks in itertools.product(*(closed_subsets(tree) for tree in some)):
        rows = len(some) + sum(int(mask.sum()) for mask in masks)
        tokens = len(some) + sum(float(value[mask].sum()) for value, mask in zip(values, masks, strict=True))
        choices.append((tokens, *times(np.array([rows, other_rows + rows])).tolist()))
    best = max(tokens / seconds for tokens, seconds, _ in choices)
    if other_rows == 0:
        assert rate(chosen, times) == pytest.approx(best, rel=1e-6)
    tokens, seconds = tokens_and_seconds(chosen, times, other_rows)
    net = max(tokens - best * seconds for tokens, _, seconds in choices)
    assert tokens - best * seconds == pytest.approx(net, rel=1e-6, abs=1e-6)


@bounded
@given(some_trees, step_times())
def test_a_tuned_budget_is_never_slower_than_none_or_all(some: list[TokenTree], times: StepTimes) -> None:
    chosen = select(some, None, times)
    for part, tree in zip(chosen, some, strict=True):
        assert_whole_paths(part, tree)
    none = [TokenTree.of((), (), "context")] * len(some)
    speed = rate(chosen, times) * (1 + 1e-6)
    assert speed >= rate(none, times)
    assert speed >= rate(some, times)


def test_slots_with_equal_candidates_stop_where_a_node_stops_paying() -> None:
    """Eight slots with the same candidates tie; passes of up to 16 rows cost the same, so eight nodes are free."""
    tree = TokenTree.of([1, 2], [-1, 0], "context", [0.5, 1.0])
    times = StepTimes((1, 16, 32, 64), (0.01, 0.01, 0.05, 0.09))
    chosen = select([tree] * 8, None, times)
    assert sum(len(part) for part in chosen) == 8


def test_likely_chains_are_taken_whole_and_hopeless_ones_left() -> None:
    likely = TokenTree.of([1, 2, 3, 4], [-1, 0, 1, 2], "context", [0.95] * 4)
    hopeless = TokenTree.of([1, 2, 3, 4], [-1, 0, 1, 2], "context", [0.01] * 4)
    times = StepTimes((1, 2, 64), (0.01, 0.0105, 0.0415))
    assert [len(tree) for tree in select([likely, hopeless], None, times)] == [4, 0]


def test_a_long_prefill_makes_no_unlikely_node_worth_its_row() -> None:
    """Half a second of prefill is lost anyway; a row of a millisecond at 100 tokens a second must bring a tenth."""
    times = StepTimes((1, 64, 512), (0.01, 0.073, 0.521))
    unlikely = TokenTree.of([1, 2, 3], [-1, -1, -1], "context", [0.5, 0.08, 0.05])
    assert [len(tree) for tree in select([unlikely], None, times)] == [1]
    assert [len(tree) for tree in select([unlikely], None, times, other_rows=500)] == [1]


def test_empty_trees_need_no_times() -> None:
    empty = TokenTree.of((), (), "context")
    assert [len(tree) for tree in select([empty, empty], 5, None)] == [0, 0]
    assert [len(tree) for tree in select([empty], None, StepTimes((1, 2), (0.1, 0.2)))] == [0]


@bounded
@given(step_times(), st.lists(st.tuples(st.integers(1, 600), st.floats(0, 1)), max_size=60))
def test_times_never_fall_with_rows(times: StepTimes, rounds: list[tuple[int, float]]) -> None:
    for rows, seconds in rounds:
        times.observe(rows, seconds)
    seconds_of = times(np.arange(1, 1500))
    assert bool((np.diff(seconds_of) >= -1e-12).all())
    assert float(seconds_of[0]) > 0


def test_times_start_at_what_was_measured() -> None:
    rows, seconds = (1, 2, 4, 8, 16, 32, 64), (0.04, 0.041, 0.045, 0.055, 0.067, 0.087, 0.139)
    np.testing.assert_allclose(StepTimes(rows, seconds)(np.array(rows)), seconds, rtol=1e-9)


@pytest.mark.parametrize("rows", [1, 5, 40, 200, 800, 1600])
def test_times_learn_what_rounds_really_take(rows: int) -> None:
    """At every size a batch can have, the largest (16 slots of 96 nodes) included."""
    times = StepTimes((1, 2, 4, 8, 16, 32, 64), (0.04, 0.041, 0.045, 0.055, 0.067, 0.087, 0.139))
    wanted = 1.8 * float(times(np.array([rows]))[0])
    for _ in range(300):
        times.observe(rows, wanted)
    assert float(times(np.array([rows]))[0]) == pytest.approx(wanted, rel=0.05)


def test_rows_beyond_the_measured_are_never_free() -> None:
    """A slow measurement before the last must not make the slope vanish, and with it the price of all further rows."""
    times = StepTimes((1, 2, 4, 8, 16, 32, 64), (0.04, 0.041, 0.045, 0.055, 0.067, 0.14, 0.139))
    assert float(times(np.array([640]))[0]) > 3 * float(times(np.array([64]))[0])


def test_a_few_rounds_correct_what_was_measured_at_start() -> None:
    """Real rounds of 64 slots took 1.4 times what empty contexts promised; a batch was over before that was learned."""
    times = StepTimes((1, 64, 128), (0.02, 0.049, 0.077))
    wanted = 1.4 * times(np.array([40, 83]))
    for _ in range(5):
        times.observe(83, float(wanted[1]))
    assert float(times(np.array([83]))[0]) == pytest.approx(wanted[1], rel=0.12)
    for _ in range(5):
        times.observe(40, float(wanted[0]))
    np.testing.assert_allclose(times(np.array([40, 83])), wanted, rtol=0.12)


def test_one_paused_round_changes_little() -> None:
    times = StepTimes((1, 64), (0.04, 0.14))
    rows = np.arange(1, 600)
    before = times(rows)
    times.observe(16, 60.0)
    assert bool((times(rows) <= before * 1.2).all()), "even if it is the first"
    for _ in range(30):
        times.observe(16, float(np.interp(16, rows, before)))
    settled = times(rows)
    times.observe(16, 60.0)
    assert bool((times(rows) <= settled * 1.03).all())
    assert float(times(np.array([16]))[0]) < 1.05 * before[15]
