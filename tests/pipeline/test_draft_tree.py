"""A growing tree is what EAGLE-2 says: the best leaves expanded level by level, the best nodes kept."""

from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.draft_tree import GrowingTree, drafted_forest
from pipeline.tree import TokenTree
from tests.pipeline.toys import path_of

Path = tuple[int, ...]
VOCABULARY = 12


def logprobs_after(seed: int) -> Callable[[Path], np.ndarray]:
    """A random distribution after every path."""

    def after(path: Path) -> np.ndarray:
        logits = np.random.default_rng([seed, *path]).normal(0, 2, VOCABULARY)
        normalised: np.ndarray = logits - np.log(np.exp(logits).sum())
        return normalised.astype(np.float32)

    return after


def best(row: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-row, kind="stable")[:k]


def grown(after: Callable[[Path], np.ndarray], depth: int, width: int, branches: int) -> GrowingTree:
    tree = GrowingTree(width)
    for _ in range(depth):
        paths: list[Path] = [()]
        if tree.num_new:
            n = len(tree.expanded)
            paths = [path_of(tree.expanded, i) for i in range(n - tree.num_new, n)]
        rows = [after(path) for path in paths]
        tokens = np.stack([best(row, branches) for row in rows])
        tree.grow(np.take_along_axis(np.stack(rows), tokens, 1), tokens)
    return tree


def finished(tree: GrowingTree, num_nodes: int) -> TokenTree:
    """Beside a view that was not drafted for."""
    nothing, found = drafted_forest([None, tree], num_nodes)
    assert not len(nothing)
    return found


def brute_force(after: Callable[[Path], np.ndarray], depth: int, width: int, branches: int) -> dict[Path, float]:
    """All candidates by path, with their cumulative log-probabilities."""
    values: dict[Path, float] = {(): 0.0}
    frontier: list[Path] = [()]
    for _ in range(depth):
        new = {(*path, int(t)): values[path] + after(path)[t] for path in frontier for t in best(after(path), branches)}
        values |= new
        frontier = sorted(new, key=lambda path: -new[path])[:width]
    del values[()]
    return values


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 40))
def test_the_most_likely_candidates_remain(seed: int, depth: int, width: int, branches: int, num_nodes: int) -> None:
    after = logprobs_after(seed)
    tree = finished(grown(after, depth, width, branches), num_nodes)
    values = brute_force(after, depth, width, branches)
    kept = {path_of(tree, i) for i in range(len(tree))}
    assert len(tree) == min(num_nodes, len(values))
    assert kept == set(sorted(values, key=lambda path: -values[path])[:num_nodes])
    for i in range(len(tree)):
        path = path_of(tree, i)
        assert np.isclose(tree.scores[i], np.exp(after(path[:-1])[path[-1]]), rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 14), st.sampled_from([1, 3, 9]), st.integers(1, 10))
def test_what_is_expanded_is_a_tree_of_the_nodes_chosen(seed: int, depth: int, width: int, branches: int) -> None:
    """Far beyond the room that is there at first, parts of the frontier left out at random."""
    after, random = logprobs_after(seed), np.random.default_rng(seed)
    tree = GrowingTree(width)
    chosen: list[Path] = []
    new: list[Path] = [()]
    for _ in range(depth):
        rows = [after(path) for path in new]
        tokens = np.stack([best(row, branches) for row in rows])
        tree.grow(np.take_along_axis(np.stack(rows), tokens, 1), tokens)
        keep = random.random(len(tree.frontier)) < 0.7
        keep[random.integers(len(keep))] = True
        tree.narrow(keep)
        whole = TokenTree.of(tree.tokens, tree.parents, "draft")
        new = [path_of(whole, node) for node in tree.frontier]
        chosen += new
        expanded = tree.expanded
        assert [path_of(expanded, node) for node in range(len(expanded))] == chosen
        assert tree.num_new == len(new)
        paths = [sum(float(after(path[:i])[path[i]]) for i in range(len(path))) for path in new]
        assert np.allclose(tree.frontier_logprobs, paths, rtol=1e-4)


def test_candidates_that_were_filtered_out_never_enter() -> None:
    tree = GrowingTree(4)
    tree.grow(np.array([[-0.1, -np.inf, -np.inf]], np.float32), np.array([[5, 6, 7]]))
    assert finished(tree, 10).tokens.tolist() == [5]
    assert tree.num_new == 1
    tree.grow(np.array([[-1.0, -2.0, -np.inf]], np.float32), np.array([[5, 6, 7]]))
    assert finished(tree, 10).parents.tolist() == [-1, 0, 0]
