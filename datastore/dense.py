"""The dense index of one segment: passages, their vectors, and a FAISS index that finds candidates.

    passages.bin   [P, 2] uint32, begin and end of each passage in the segment's tokens
    vectors.bin    [P, D] float16, of length 1
    dense.faiss    see datastore/dense_faiss.py

Knows neither texts nor tokens: queries come as vectors, results are passage numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from datastore.dense_faiss import build_index, factory_for, inverted_file, read_index, search
from datastore.format import write_array
from pipeline.durable import fsync
from pipeline.errors import DatastoreError

__all__ = ["DENSE_FILES", "DenseIndex", "factory_for", "write_dense"]

_PASSAGES, _VECTORS, _FAISS = DENSE_FILES = ("passages.bin", "vectors.bin", "dense.faiss")
_WRITE_BYTES = 1 << 20
_REMEDY = "Restore the file, or build the datastore again."


def write_dense(
    directory: Path, spans: np.ndarray, vectors: np.ndarray, *, factory: str | None = None
) -> tuple[str, ...]:
    """Write a segment's dense index, and make it survive a power cut.

    Args:
        spans: [P, 2] uint32, from `passage_spans`.
        vectors: [P, D] float32 or float16, of length 1.
        factory: FAISS factory string; None takes the one for this size.

    Returns:
        The names of the files written.

    Raises:
        DatastoreError: they cannot be written.
    """
    assert spans.shape == (len(vectors), 2)
    stored = vectors.astype(np.float16, copy=False)
    with _writing(directory / _PASSAGES) as path:
        write_array(path, spans.astype(np.uint32, copy=False))
    with _writing(directory / _VECTORS) as path:
        write_array(path, stored)
    index = build_index(stored, factory or factory_for(*vectors.shape))
    with _writing(directory / _FAISS) as path, path.open("wb") as file:
        # Given a path, FAISS may lose its last bytes on a full disk and not notice.
        untyped: Any = faiss  # its stubs lack the writer
        faiss.write_index(index, untyped.PyCallbackIOWriter(file.write, _WRITE_BYTES))
    return DENSE_FILES


class DenseIndex:
    """The dense index of a segment, opened for search; make one with `open`. Searches may run in several threads."""

    def __init__(self, spans: np.ndarray, vectors: np.ndarray, index: Any) -> None:
        self._spans = spans
        self._vectors = vectors
        self._index = index

    @classmethod
    def open(cls, directory: Path, num_passages: int, dimension: int) -> "DenseIndex":
        """Map a segment's files; what FAISS keeps in inverted lists stays on disk until it is read.

        Args:
            num_passages: P, from the segment's record.
            dimension: D, from the datastore's manifest.

        Raises:
            DatastoreError: a file is missing, damaged, or of another size.
        """
        spans = _mapped(directory / _PASSAGES, (num_passages, 2), np.dtype(np.uint32))
        vectors = _mapped(directory / _VECTORS, (num_passages, dimension), np.dtype(np.float16))
        path = directory / _FAISS
        try:
            index = read_index(str(path))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise DatastoreError(f"{path} cannot be read by FAISS: {reason} {_REMEDY}") from error
        if (index.ntotal, index.d) != (num_passages, dimension):
            raise DatastoreError(
                f"{path} has {index.ntotal:,} vectors of {index.d} components, the manifest says {num_passages:,} of "
                f"{dimension}. {_REMEDY}"
            )
        return cls(spans, vectors, index)

    @property
    def spans(self) -> np.ndarray:
        """[P, 2] uint32, begin and end of each passage in the segment's tokens."""
        return self._spans

    @property
    def vectors(self) -> np.ndarray:
        """[P, D] float16, of length 1."""
        return self._vectors

    @property
    def nprobe(self) -> int | None:
        """Inverted lists that a search visits, as found when the index was built; None for an exhaustive index."""
        ivf = inverted_file(self._index)
        return None if ivf is None else int(ivf.nprobe)

    def search(self, queries: np.ndarray, k: int, *, nprobe: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest passages of each query.

        Args:
            queries: [Q, D] float32, of length 1.
            nprobe: inverted lists to visit; None takes the number found when the index was built.

        Returns:
            Scores (cosines) [Q, k] float32, descending, and passage numbers [Q, k] int64; -inf and -1 where there are
            fewer than k.
        """
        return search(self._index, self._vectors, queries, k, nprobe)


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    try:
        yield path
        fsync(path)
    except (OSError, RuntimeError) as error:  # RuntimeError is FAISS's only one
        reason = str(error).strip().splitlines()[-1]
        raise DatastoreError(f"{path} cannot be written: {reason}. Free space or mend the directory.") from error


def _mapped(path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray:
    wanted = shape[0] * shape[1] * dtype.itemsize
    try:
        size = path.stat().st_size
        if size != wanted:
            raise DatastoreError(f"{path} has {size:,} bytes, the manifest says {wanted:,}. {_REMEDY}")
        if size == 0:  # which cannot be mapped
            return np.empty(shape, dtype)
        return np.asarray(np.memmap(path, dtype, "r", shape=shape))
    except OSError as error:
        raise DatastoreError(f"{path} cannot be read: {error}. {_REMEDY}") from error
