"""Dense search finds what exhaustive search over the stored vectors finds, and a damaged index is refused."""

import inspect
import pydoc
from pathlib import Path

import numpy as np
import pytest

from datastore.dense import DENSE_FILES, DenseIndex, factory_for, write_dense
from datastore.embedder import DEFAULT_EMBEDDER, Embedder
from pipeline.errors import DatastoreError

DIMENSION = 32
APPROXIMATE = ("IVF64,SQ8", "IVF64,PQ8np", "OPQ8,IVF64,PQ8np")
MODULES = ("argparse", "collections", "csv", "json", "logging", "os", "pathlib", "random", "shutil", "statistics")


def clustered(num_vectors: int, seed: int = 0, noise: float = 0.6) -> np.ndarray:
    """Unit vectors [P, D] around 100 centres; the centres are the same for every seed."""
    centres = np.random.default_rng(7).normal(size=(100, DIMENSION))
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(0, 100, num_vectors)] + noise * random.normal(size=(num_vectors, DIMENSION))
    return unit(vectors)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def spans_for(vectors: np.ndarray) -> np.ndarray:
    begins = 96 * np.arange(len(vectors))
    return np.stack([begins, begins + 128], axis=1).astype(np.uint32)


def built(directory: Path, vectors: np.ndarray, factory: str | None = None) -> DenseIndex:
    assert write_dense(directory, spans_for(vectors), vectors, factory=factory) == DENSE_FILES
    return DenseIndex.open(directory, *vectors.shape)


def brute_force(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and passages by sorting all inner products with the stored fp16 vectors; lower numbers first in ties."""
    scores = np.stack([vectors.astype(np.float16).astype(np.float32) @ query for query in queries])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True)]))


@pytest.fixture(scope="module")
def docstrings() -> np.ndarray:
    """MiniLM's vectors [P, 384] of what the standard library says about itself, one first paragraph each."""
    texts = set()
    for module in map(pydoc.locate, MODULES):
        for _, member in inspect.getmembers(module, callable):
            members = [member, *(vars(member).values() if inspect.isclass(member) else [])]
            texts.update(text.split("\n\n")[0] for text in map(inspect.getdoc, members) if text and len(text) > 40)
    return Embedder.load(DEFAULT_EMBEDDER).encode(sorted(texts)[:400])


def test_flat_equals_brute_force(tmp_path: Path) -> None:
    vectors, queries = clustered(3000), clustered(50, seed=1)
    scores, passages = built(tmp_path, vectors).search(queries, 10)
    expected_scores, expected = brute_force(vectors, queries, 10)
    assert (passages == expected).all()
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    assert scores.dtype == np.float32 and passages.dtype == np.int64


def test_flat_equals_brute_force_on_real_embeddings(docstrings: np.ndarray, tmp_path: Path) -> None:
    assert len(docstrings) == 400
    index = built(tmp_path, docstrings[40:])
    assert (index.search(docstrings[:40], 5)[1] == brute_force(docstrings[40:], docstrings[:40], 5)[1]).all()


@pytest.mark.parametrize("factory", APPROXIMATE)
def test_approximate_kinds_reach_the_recall(factory: str, tmp_path: Path) -> None:
    vectors, queries = clustered(10_000), clustered(200, seed=1)
    scores, passages = built(tmp_path, vectors, factory).search(queries, 10)
    expected_scores, expected = brute_force(vectors, queries, 10)
    assert recall(passages, expected) >= 0.95
    assert (np.diff(scores, axis=1) <= 0).all()
    hit = passages[:, 0] == expected[:, 0]
    np.testing.assert_allclose(scores[hit, 0], expected_scores[hit, 0], atol=1e-6)


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "IVF16,PQ48x4np"])
def test_approximate_kinds_reach_the_recall_on_real_embeddings(
    factory: str, docstrings: np.ndarray, tmp_path: Path
) -> None:
    index = built(tmp_path, docstrings[40:], factory)
    assert recall(index.search(docstrings[:40], 10)[1], brute_force(docstrings[40:], docstrings[:40], 10)[1]) >= 0.95


def test_vectors_without_clusters_make_a_search_visit_more(tmp_path: Path) -> None:
    """The number of lists follows the data: a fixed one would lose recall where there is nothing to cluster."""
    vectors = unit(np.random.default_rng(3).normal(size=(10_000, DIMENSION)))
    queries = unit(np.random.default_rng(4).normal(size=(100, DIMENSION)))
    index = built(tmp_path, vectors, "IVF64,SQ8")
    expected = brute_force(vectors, queries, 10)[1]
    assert recall(index.search(queries, 10)[1], expected) >= 0.95
    assert recall(index.search(queries, 10, nprobe=2)[1], expected) < 0.7


@pytest.mark.parametrize("factory", APPROXIMATE)
def test_visiting_all_lists_beats_visiting_one(factory: str, tmp_path: Path) -> None:
    vectors, queries = clustered(10_000, noise=2.0), clustered(100, seed=1, noise=2.0)
    index = built(tmp_path, vectors, factory)
    expected = brute_force(vectors, queries, 10)[1]
    one, every = (recall(index.search(queries, 10, nprobe=nprobe)[1], expected) for nprobe in (1, 64))
    assert one + 0.2 < every and every >= 0.95


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8"])
def test_equal_vectors_come_in_the_order_of_passages(factory: str, tmp_path: Path) -> None:
    vectors = np.tile(clustered(50), (3, 1))
    scores, passages = built(tmp_path, vectors, factory).search(vectors[:50], 3)
    assert passages.tolist() == [[i, i + 50, i + 100] for i in range(50)]
    assert (scores == scores[:, :1]).all()


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8"])
def test_more_results_than_passages(factory: str, tmp_path: Path) -> None:
    vectors = clustered(7)
    scores, passages = built(tmp_path, vectors, factory).search(vectors[:2], 10, nprobe=4)
    assert (np.sort(passages[:, :7]) == np.arange(7)).all()
    assert (passages[:, 7:] == -1).all() and (scores[:, 7:] == -np.inf).all()


def test_no_passages_and_no_queries(tmp_path: Path) -> None:
    empty = built(tmp_path, np.empty((0, DIMENSION), np.float32))
    scores, passages = empty.search(clustered(2), 3)
    assert passages.tolist() == [[-1] * 3] * 2 and (scores == -np.inf).all()
    assert empty.spans.shape == (0, 2)
    assert built(tmp_path, clustered(5)).search(np.empty((0, DIMENSION), np.float32), 3)[1].shape == (0, 3)


def test_files_hold_what_was_given(tmp_path: Path) -> None:
    vectors = clustered(100)
    index = built(tmp_path, vectors)
    assert (index.spans == spans_for(vectors)).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(DENSE_FILES)
    stored = np.fromfile(tmp_path / "vectors.bin", np.float16).reshape(100, DIMENSION)
    assert (stored == vectors.astype(np.float16)).all()
    with pytest.raises(ValueError, match="read-only"):
        index.spans[0] = 0


@pytest.mark.parametrize("factory", APPROXIMATE)
def test_a_build_repeats_to_the_byte(factory: str, tmp_path: Path) -> None:
    vectors = clustered(3000)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        built(tmp_path / name, vectors, factory)
    assert (tmp_path / "a" / "dense.faiss").read_bytes() == (tmp_path / "b" / "dense.faiss").read_bytes()


def test_half_precision_vectors_give_the_same_index(tmp_path: Path) -> None:
    vectors = clustered(3000)
    for name, given in (("a", vectors), ("b", vectors.astype(np.float16))):
        (tmp_path / name).mkdir()
        built(tmp_path / name, given, "IVF16,SQ8")
    assert (tmp_path / "a" / "dense.faiss").read_bytes() == (tmp_path / "b" / "dense.faiss").read_bytes()


@pytest.mark.parametrize("factory", ["Flat", *APPROXIMATE])
def test_a_cut_faiss_file_is_refused(factory: str, tmp_path: Path) -> None:
    built(tmp_path, clustered(3000), factory)
    path = tmp_path / "dense.faiss"
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DatastoreError, match=r"dense\.faiss cannot be read by FAISS.*build the datastore again"):
            DenseIndex.open(tmp_path, 3000, DIMENSION)


@pytest.mark.parametrize("name", DENSE_FILES)
def test_a_missing_file_is_refused(name: str, tmp_path: Path) -> None:
    built(tmp_path, clustered(20))
    (tmp_path / name).unlink()
    with pytest.raises(DatastoreError, match=name):
        DenseIndex.open(tmp_path, 20, DIMENSION)


@pytest.mark.parametrize("name", ["passages.bin", "vectors.bin"])
def test_a_cut_array_is_refused(name: str, tmp_path: Path) -> None:
    built(tmp_path, clustered(20))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatastoreError, match=f"{name} has .* bytes, the manifest says"):
        DenseIndex.open(tmp_path, 20, DIMENSION)


def test_the_faiss_file_of_another_segment_is_refused(tmp_path: Path) -> None:
    for name, size in (("a", 20), ("b", 21)):
        (tmp_path / name).mkdir()
        built(tmp_path / name, clustered(size))
    (tmp_path / "b" / "dense.faiss").replace(tmp_path / "a" / "dense.faiss")
    with pytest.raises(DatastoreError, match="has 21 vectors of 32 components, the manifest says 20 of 32"):
        DenseIndex.open(tmp_path / "a", 20, DIMENSION)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatastoreError, match=r"nowhere.passages\.bin cannot be written.*No such file"):
        write_dense(tmp_path / "nowhere", spans_for(clustered(3)), clustered(3))


@pytest.mark.parametrize(
    ("num_passages", "dimension", "factory"),
    [
        (0, 384, "Flat"),
        (9_999, 384, "Flat"),
        (10_000, 384, "IVF1024,SQ8"),
        (50_000, 768, "IVF2048,SQ8"),
        (1_000_000, 384, "IVF8192,SQ8"),
        (1_000_001, 384, "OPQ48,IVF8192,PQ48np"),
        (2_000_000, 1020, "OPQ102,IVF8192,PQ102np"),
        (1_000_000_000, 4, "OPQ1,IVF16384,PQ1np"),
    ],
)
def test_the_kind_follows_the_size(num_passages: int, dimension: int, factory: str) -> None:
    assert factory_for(num_passages, dimension) == factory
