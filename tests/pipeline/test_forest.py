"""A forest is its trees: whatever is done to all of them at once is what is done to each."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.acceptance import AcceptanceTable, score
from pipeline.budget import StepTimes, select
from pipeline.calibration import Calibration, probabilities
from pipeline.economy import net_tokens, net_tokens_of
from pipeline.forest import Forest, fuse, fuse_forests
from pipeline.lookup import Lookup
from pipeline.search import trees_of
from pipeline.tree import EMPTY_TREE, SOURCES, TokenTree, path_values, prune
from pipeline.verify import Outcome, walk, walk_forest
from tests.pipeline.toys import path_of, trees

bounded = settings(deadline=None, max_examples=60)
some_trees = st.lists(trees(max_nodes=8), max_size=5)
some_choices = st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=5, max_size=5)


def assert_same(left: TokenTree, right: TokenTree) -> None:
    for name in ("tokens", "parents", "scores", "evidence", "matches"):
        ours, theirs = getattr(left, name), getattr(right, name)
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()


@bounded
@given(some_trees)
def test_it_is_the_sequence_of_its_trees(some: list[TokenTree]) -> None:
    forest = Forest.of(some)
    assert len(forest) == len(some) and forest.num_nodes == sum(map(len, some))
    for got, tree in zip(forest, some, strict=True):
        assert_same(got, tree)
    assert [len(tree) for tree in forest[1:]] == [len(tree) for tree in some[1:]]
    assert Forest.of(forest) is forest
    with pytest.raises(IndexError):
        forest[len(some)]
    if some:
        assert_same(forest[-1], some[-1])


@bounded
@given(st.lists(st.tuples(trees(max_nodes=6), trees(max_nodes=6), trees(max_nodes=6)), max_size=4))
def test_forests_are_fused_tree_by_tree(groups: list[tuple[TokenTree, ...]]) -> None:
    columns = [Forest.of([group[k] for group in groups]) for k in range(3)]
    for got, group in zip(fuse_forests(columns), groups, strict=True):
        assert_same(got, fuse(group))


def test_fusing_with_nothing_gives_the_forest_itself() -> None:
    forest = Forest.of([TokenTree.of([1, 2], [-1, 0], "draft"), EMPTY_TREE])
    assert fuse_forests([Forest.empty(2), forest, Forest.empty(2)]) is forest


@bounded
@given(some_trees, st.integers(0, 1 << 30))
def test_pruning_keeps_what_pruning_each_keeps(some: list[TokenTree], seed: int) -> None:
    forest, random = Forest.of(some), np.random.default_rng(seed)
    parts = []
    for tree in some:
        keep = np.zeros(len(tree), np.bool_)
        for node, parent in enumerate(tree.parents):
            keep[node] = random.random() < 0.7 and (parent < 0 or keep[parent])
        parts.append(keep)
    pruned = forest.pruned(np.concatenate([np.empty(0, np.bool_), *parts]))
    for got, tree, keep in zip(pruned, some, parts, strict=True):
        assert_same(got, prune(tree, keep))
    assert forest.pruned(np.ones(forest.num_nodes, np.bool_)) is forest


@bounded
@given(some_trees)
def test_values_are_those_of_each_tree(some: list[TokenTree]) -> None:
    values = np.split(Forest.of(some).values(), np.cumsum([len(tree) for tree in some])[:-1])
    for got, tree in zip(values, some, strict=bool(some)):
        assert got.tolist() == path_values(tree.parents, tree.scores).tolist()


@bounded
@given(some_trees, st.integers(0, 6))
def test_a_budget_holds_for_each_tree(some: list[TokenTree], budget: int) -> None:
    for got, tree in zip(select(some, budget, None), some, strict=True):
        assert_same(got, select([tree], budget, None)[0])
    assert len(select(some, None, StepTimes((1, 8), (0.1, 0.2)))) == len(some)


@bounded
@given(some_trees, st.integers(0, 1 << 30))
def test_walks_are_those_of_each_tree(some: list[TokenTree], seed: int) -> None:
    """The rows of their logits stand in any order."""
    random = np.random.default_rng(seed)
    sizes = [len(tree) + 1 for tree in some]
    order = random.permutation(len(some))
    rows, at = np.zeros(len(some), np.int64), 3
    for place in order:
        rows[place] = at
        at += sizes[place]
    choices = random.integers(0, 3, at)
    rows[random.random(len(some)) < 0.2] = -1
    found = walk_forest(Forest.of(some), choices, rows)
    assert len(found.begins) == len(found.outcome.begins) == len(some) + 1
    for place, tree in enumerate(some):
        nodes = slice(found.begins[place], found.begins[place + 1])
        along = found.outcome.choices[found.outcome.begins[place] : found.outcome.begins[place + 1]]
        if rows[place] < 0:
            assert nodes.start == nodes.stop and not len(along)
            continue
        own = choices[rows[place] : rows[place] + sizes[place]]
        path = walk(tree.tokens, tree.parents, own)
        assert found.nodes[nodes].tolist() == path.tolist()
        assert along.tolist() == own[[0, *(path + 1)]].tolist()
        assert found.sources[nodes].tolist() == tree.sources[path].tolist()


@bounded
@given(some_trees, some_choices, st.lists(st.booleans(), min_size=5, max_size=5))
def test_what_is_learned_is_learned_tree_by_tree(
    some: list[TokenTree], choices: list[list[int]], sampled: list[bool]
) -> None:
    """One after the other: what a tree teaches depends on those before it."""
    n = len(some)
    along = [np.array(part, np.int64) for part in choices[:n]]
    forest, outcome, is_sampled = Forest.of(some), Outcome.of(along), np.array(sampled[:n], np.bool_)
    together, apart = (Calibration(), AcceptanceTable()), (Calibration(), AcceptanceTable())
    before = [
        probabilities(tree.parents, tree.evidence, s, together[0].weights).tolist()
        for tree, s in zip(some, sampled, strict=False)
    ]
    assert [tree.scores.tolist() for tree in together[0].scored(forest, is_sampled)] == before
    together[0].observe(forest, outcome, is_sampled)
    together[1].observe(forest, outcome)
    for i in range(n):
        apart[0].observe(Forest.of([some[i]]), Outcome.of([along[i]]), is_sampled[i : i + 1])
        apart[1].observe(Forest.of([some[i]]), Outcome.of([along[i]]))
    assert together[0].weights.tolist() == apart[0].weights.tolist()
    assert together[1].rates.tolist() == apart[1].rates.tolist()
    nets = net_tokens_of(
        *(forest.tokens, forest.parents, forest.scores, forest.begins, outcome.choices, outcome.begins), 0.2
    )
    expected = [
        net_tokens(tree.tokens, tree.parents, tree.scores, part, 0.2) for tree, part in zip(some, along, strict=True)
    ]
    assert nets.tolist() == expected


@bounded
@given(st.lists(trees(max_nodes=8), max_size=4), st.lists(st.integers(1, 40), min_size=4, max_size=4))
def test_a_lookup_gives_the_scored_trie_of_each_context(some: list[TokenTree], lengths: list[int]) -> None:
    """Against the trie's own estimates; what is not worth carrying goes, and so do tokens that the model has not."""
    forest, rates = Forest.of(some), AcceptanceTable().rates
    counts = np.arange(1, forest.num_nodes + 1, dtype=np.int32)
    matches = np.array(lengths[: len(some)], np.int32)
    found = trees_of("corpus", Lookup(matches, forest.begins, forest.tokens, forest.parents, counts), rates, 3)
    assert len(found) == len(some)
    for place, tree in enumerate(some):
        own = counts[forest.begins[place] : forest.begins[place + 1]].astype(np.float32)
        depths = np.array([len(path_of(tree, node)) for node in range(len(tree))], np.int64)
        lengths_there = np.minimum(lengths[place] + depths - 1, 32).astype(np.int16)
        sources = np.full(len(tree), SOURCES.index("corpus"), np.int8)
        scores, keep = score(tree.parents, own, lengths_there, sources, rates)
        for node, parent in enumerate(tree.parents):
            keep[node] = keep[node] and tree.tokens[node] < 3 and (parent < 0 or keep[parent])
        assert_same(
            found[place], prune(TokenTree.proposed(tree.tokens, tree.parents, scores, sources, lengths_there), keep)
        )
