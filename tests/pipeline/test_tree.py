"""Trees mean the set of their paths: fuse is union, prune is restriction, walk is the longest path that is right."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.forest import fuse
from pipeline.tree import (
    EMPTY_TREE,
    SOURCES,
    TokenTree,
    ancestor_mask,
    node_depths,
    path_values,
    places_in,
    prune,
)
from pipeline.verify import walk
from tests.pipeline.toys import path_of, trees

Path = tuple[int, ...]
bounded = settings(deadline=None, max_examples=150)


def paths(tree: TokenTree) -> dict[Path, int]:
    """Node of each path; all distinct when siblings are."""
    found = {path_of(tree, node): node for node in range(len(tree))}
    assert len(found) == len(tree), "two siblings carry one token"
    return found


def assert_well_formed(tree: TokenTree) -> None:
    n = len(tree)
    dtypes = (np.int32, np.int32, np.float32, np.float32, np.int16)
    columns = (tree.tokens, tree.parents, tree.scores, tree.evidence, tree.matches)
    assert all(len(column) == n for column in columns)
    assert [column.dtype for column in columns] == list(dtypes)
    assert bool((tree.parents < np.arange(n)).all()) and bool((tree.parents >= -1).all())
    paths(tree)


@bounded
@given(st.lists(trees(), max_size=4))
def test_fuse_is_the_union_of_paths(some: list[TokenTree]) -> None:
    fused = fuse(some)
    assert_well_formed(fused)
    nodes = paths(fused)
    assert set(nodes) == set().union(*(paths(tree) for tree in some))
    for path, node in nodes.items():
        proposals = [(tree, paths(tree)[path]) for tree in some if path in paths(tree)]
        assert fused.scores[node] == max(part.scores[own] for part, own in proposals)
        for source in range(len(SOURCES)):
            assert fused.evidence[node, source] == max(part.evidence[own, source] for part, own in proposals)
            assert fused.matches[node, source] == max(part.matches[own, source] for part, own in proposals)
        assert fused.evidence[node, fused.sources[node]] == fused.evidence[node].max() > 0


@bounded
@given(st.lists(trees(), max_size=4))
def test_fusing_again_changes_nothing(some: list[TokenTree]) -> None:
    fused = fuse(some)
    for again in (fuse([fused]), fuse([fused, fused]), fuse([EMPTY_TREE, fused, EMPTY_TREE]), fuse([fused, *some])):
        assert again.tokens.tolist() == fused.tokens.tolist()
        assert again.parents.tolist() == fused.parents.tolist()
        assert again.scores.tolist() == fused.scores.tolist()
        assert again.evidence.tolist() == fused.evidence.tolist()


@bounded
@given(trees(), trees())
def test_a_place_in_another_tree_is_the_node_with_the_same_path(tree: TokenTree, other: TokenTree) -> None:
    places = places_in(tree.tokens, tree.parents, other.tokens, other.parents)
    assert places[0] == -1
    nodes = paths(tree)
    assert places[1:].tolist() == [nodes.get(path_of(other, node), -2) for node in range(len(other))]


@bounded
@given(st.lists(trees(), min_size=1, max_size=4))
def test_fusing_leaves_its_trees_as_they_were(some: list[TokenTree]) -> None:
    before = [(tree.tokens.tolist(), tree.parents.tolist(), tree.evidence.tolist()) for tree in some]
    fuse(some)
    assert before == [(tree.tokens.tolist(), tree.parents.tolist(), tree.evidence.tolist()) for tree in some]


def test_fuse_of_nothing_is_the_empty_tree() -> None:
    assert len(fuse([])) == len(fuse([EMPTY_TREE])) == len(EMPTY_TREE) == 0
    assert_well_formed(EMPTY_TREE)


def closed_subset(tree: TokenTree, chosen: Sequence[bool]) -> np.ndarray:
    """The chosen nodes whose ancestors are all chosen, [N] bool."""
    keep = np.zeros(len(tree), np.bool_)
    for node, parent in enumerate(tree.parents):
        keep[node] = chosen[node] and (parent < 0 or keep[parent])
    return keep


@bounded
@given(trees(), st.lists(st.booleans(), min_size=12, max_size=12))
def test_prune_keeps_the_paths_of_kept_nodes(tree: TokenTree, chosen: list[bool]) -> None:
    keep = closed_subset(tree, chosen)
    pruned = prune(tree, keep)
    assert_well_formed(pruned)
    kept = np.flatnonzero(keep)
    assert [path_of(pruned, i) for i in range(len(pruned))] == [path_of(tree, int(i)) for i in kept]
    assert pruned.scores.tolist() == tree.scores[keep].tolist()
    assert pruned.sources.tolist() == tree.sources[keep].tolist()
    assert pruned.matches.tolist() == tree.matches[keep].tolist()


def ancestors(tree: TokenTree, node: int) -> list[int]:
    """`node`, its parent, and so on to a child of the root."""
    found = []
    while node >= 0:
        found.append(node)
        node = int(tree.parents[node])
    return found


@bounded
@given(trees())
def test_a_node_sees_itself_its_ancestors_and_the_root(tree: TokenTree) -> None:
    mask = ancestor_mask(tree.parents)
    assert mask.shape == (len(tree) + 1, len(tree) + 1) and mask.dtype == np.bool_
    for node in range(-1, len(tree)):
        assert np.flatnonzero(mask[node + 1]).tolist() == sorted([0, *(i + 1 for i in ancestors(tree, node))])


@bounded
@given(trees())
def test_depths_and_values_follow_the_path(tree: TokenTree) -> None:
    depths, values = node_depths(tree.parents), path_values(tree.parents, tree.scores)
    assert depths.dtype == np.int32 and values.dtype == np.float32
    for node in range(len(tree)):
        path = ancestors(tree, node)
        assert depths[node] == len(path)
        assert math.isclose(values[node], math.prod(float(tree.scores[i]) for i in path), rel_tol=1e-5, abs_tol=1e-37)
        assert tree.parents[node] < 0 or values[node] <= values[tree.parents[node]]


def naive_walk(tree: TokenTree, choose: Callable[[Path], int]) -> list[int]:
    """Descends by paths, with plain decoding's own choices."""
    nodes, accepted = paths(tree), list[int]()
    path: Path = ()
    while (path := (*path, choose(path))) in nodes:
        accepted.append(nodes[path])
    return accepted


@bounded
@given(trees(max_nodes=20, vocabulary=2), st.integers(0, 1 << 30))
def test_walk_accepts_what_plain_decoding_would_emit(tree: TokenTree, seed: int) -> None:
    """The emitted tokens are those of the choice function itself, whatever the tree."""

    def choose(path: Path) -> int:
        return hash((seed, path)) % 2

    choices = np.array([choose(()), *(choose(path_of(tree, node)) for node in range(len(tree)))], np.int64)
    accepted = walk(tree.tokens, tree.parents, choices)
    assert accepted.dtype == np.int32
    assert accepted.tolist() == naive_walk(tree, choose)
    emitted = [int(choices[0]), *(int(choices[node + 1]) for node in accepted)]
    for i, token in enumerate(emitted):
        assert token == choose(tuple(emitted[:i]))
    assert emitted[:-1] == [int(tree.tokens[node]) for node in accepted]


def test_walk_of_the_empty_tree_accepts_nothing() -> None:
    assert walk(EMPTY_TREE.tokens, EMPTY_TREE.parents, np.array([3])).tolist() == []


def test_a_tree_of_plain_lists() -> None:
    tree = TokenTree.of([7, 8], [-1, 0], "corpus", [0.5, 0.25])
    assert_well_formed(tree)
    assert [SOURCES[source] for source in tree.sources] == ["corpus", "corpus"]
    assert tree.scores.tolist() == [0.5, 0.25]
