"""Growing trees are what EAGLE-2 says: the best leaves expanded level by level, the best nodes kept."""

from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.draft_forest import GrowingForest
from pipeline.forest import Forest
from pipeline.tree import TokenTree
from tests.pipeline.toys import path_of, trees

Path = tuple[int, ...]
After = Callable[[Path], np.ndarray]
VOCABULARY = 12


def logprobs_after(seed: int) -> After:
    """A random distribution after every path."""

    def after(path: Path) -> np.ndarray:
        logits = np.random.default_rng([seed, *path]).normal(0, 2, VOCABULARY)
        normalised: np.ndarray = logits - np.log(np.exp(logits).sum())
        return normalised.astype(np.float32)

    return after


def best(row: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-row, kind="stable")[:k]


def grow(forest: GrowingForest, paths: Sequence[Path], afters: Sequence[After], branches: int) -> None:
    """A level: the best tokens after each path of the frontier, by its own tree's distributions."""
    rows = np.stack([after(path) for path, after in zip(paths, afters, strict=True)])
    tokens = np.stack([best(row, branches) for row in rows])
    forest.grow(np.take_along_axis(rows, tokens, 1), tokens)


def frontier_paths(forest: GrowingForest) -> list[Path]:
    """Of each node of the frontier."""
    paths: list[Path] = []
    for view, node in zip(forest.frontier_views.tolist(), forest.frontier.tolist(), strict=True):
        tokens, parents, _ = forest.tree(view)
        paths.append(() if node < 0 else path_of(TokenTree.of(tokens.tolist(), parents.tolist(), "draft"), node))
    return paths


def brute_force(after: After, depth: int, width: int, branches: int) -> dict[Path, float]:
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
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 40),
)
def test_the_most_likely_candidates_remain(
    depths: list[int], seed: int, width: int, branches: int, num_nodes: int
) -> None:
    """Of each tree, whatever grows beside it and how far."""
    afters = [logprobs_after(seed + view) for view in range(len(depths))]
    forest = GrowingForest(depths, width, branches)
    while len(forest.frontier):
        grow(forest, frontier_paths(forest), [afters[view] for view in forest.frontier_views], branches)
    for tree, after, depth in zip(forest.likeliest(num_nodes), afters, depths, strict=True):
        values = brute_force(after, depth, width, branches)
        kept = {path_of(tree, i) for i in range(len(tree))}
        assert len(tree) == min(num_nodes, len(values))
        assert kept == set(sorted(values, key=lambda path: -values[path])[:num_nodes])
        for i in range(len(tree)):
            path = path_of(tree, i)
            assert np.isclose(tree.scores[i], np.exp(after(path[:-1])[path[-1]]), rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 14), min_size=1, max_size=3),
    st.integers(0, 1000),
    st.sampled_from([1, 3, 9]),
    st.integers(1, 10),
    st.lists(trees(max_nodes=8), min_size=3, max_size=3),
)
def test_what_is_expanded_is_a_tree_of_the_nodes_chosen(
    depths: list[int], seed: int, width: int, branches: int, found: list[TokenTree]
) -> None:
    """Parts of the frontier, or a tree's whole frontier, are left out at random."""
    random, other = np.random.default_rng(seed), Forest.of(found[: len(depths)])
    afters = [logprobs_after(seed + view) for view in range(len(depths))]
    forest = GrowingForest(depths, width, branches)
    chosen: list[list[Path]] = [[()] for _ in depths]  # what the draft model sees, by view
    for level in range(max(depths)):
        before = frontier_paths(forest)
        keep = random.random(len(forest.frontier)) < 0.7
        forest.narrow(keep)
        new = frontier_paths(forest)
        views = forest.frontier_views.tolist()
        assert new == [path for path, is_kept in zip(before, keep, strict=True) if is_kept]
        assert [views.count(view) for view in forest.views] == np.diff(forest.begins).tolist()
        for view, path in zip(views, new, strict=True) if level else ():
            chosen[view].append(path)
        seen = forest.seen()
        tokens, parents, ends = seen.tokens, seen.parents, np.cumsum(seen.num_nodes).tolist()
        done = [len(chosen[view]) - views.count(view) for view in forest.views]
        assert seen.num_done.tolist() == done if level else not seen.num_done.any()
        for view, begin, end in zip(forest.views.tolist(), [0, *ends], ends, strict=False):
            expanded = TokenTree.of(tokens[begin:end].tolist(), parents[begin:end].tolist(), "draft")
            assert [(), *(path_of(expanded, node) for node in range(len(expanded)))] == chosen[view]
            assert forest.expanded_of(view).tokens.tolist() == expanded.tokens.tolist()
            assert forest.expanded_of(view).parents.tolist() == expanded.parents.tolist()
        for view, path, place, above in zip(views, new, seen.places, seen.above, strict=True):
            assert chosen[view][place] == path
            assert chosen[view][above] == path[:-1] if path else above == -1
        paths = [
            sum(float(afters[view](p[:i])[p[i]]) for i in range(len(p))) for view, p in zip(views, new, strict=True)
        ]
        assert np.allclose(forest.frontier_logprobs, paths, rtol=1e-4)
        check_places(forest, other, views, new)
        if new:
            grow(forest, new, [afters[view] for view in views], branches)


def check_places(forest: GrowingForest, other: Forest, views: list[int], paths: list[Path]) -> None:
    """Against all paths of the other trees."""
    known = {}
    for view, tree in enumerate(other):
        first = int(other.begins[view]) + view
        known |= {(view, ()): first} | {(view, path_of(tree, i)): first + 1 + i for i in range(len(tree))}
    wanted = [known.get((view, path), -1) for view, path in zip(views, paths, strict=True)]
    assert forest.places_in(other).tolist() == wanted


def test_candidates_that_were_filtered_out_never_enter() -> None:
    forest = GrowingForest([3], 4, 3)
    forest.grow(np.array([[-0.1, -np.inf, -np.inf]], np.float32), np.array([[5, 6, 7]]))
    assert forest.likeliest(10).tokens.tolist() == [5]
    assert forest.frontier.tolist() == [0]
    forest.grow(np.array([[-1.0, -2.0, -np.inf]], np.float32), np.array([[5, 6, 7]]))
    assert forest.likeliest(10).parents.tolist() == [-1, 0, 0]


def test_a_tree_without_candidates_grows_no_further() -> None:
    forest = GrowingForest([3, 3], 4, 2)
    forest.grow(np.array([[-np.inf, -np.inf], [-0.5, -1.0]], np.float32), np.array([[5, 6], [7, 8]]))
    assert forest.views.tolist() == [1]
    assert [len(tree) for tree in forest.likeliest(10)] == [0, 2]
