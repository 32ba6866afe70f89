"""A segment: an immutable run of documents with its suffix index, in memory or on disk.

Tokens lie in one array with a separator before the first document, between documents and after the last, so that no
loop needs to know where a document ends. The format and its invariants are in datastore/README.md.
"""

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datastore.dense import DenseIndex, write_dense
from datastore.format import (
    RECORD,
    SEGMENTS,
    SegmentRecord,
    record_files,
    token_dtype,
    write_array,
    write_record,
)
from datastore.suffix_build import SAMPLE_STEP, SuffixArrays, build_suffix, separator
from datastore.suffix_search import table_row
from pipeline.durable import fsync
from pipeline.errors import DatastoreError

MAX_TOKENS = (1 << 32) - 2
_TOKENS, _PLACES, _BUCKETS, _SAMPLES = "tokens.bin", "places.bin", "buckets.bin", "samples.bin"
_DOCUMENTS, _NAMES = "documents.bin", "names.bin"
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens and index of a run of documents.

    Attributes:
        tokens: [n] uint16 or uint32, with separators.
        offsets: [D + 1] int64; document d is `tokens[offsets[d]:offsets[d + 1] - 1]`.
        suffix: places sorted by their preceding tokens.
        row: [8] int64, the segment's row of a search table; valid while the segment lives.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    suffix: SuffixArrays
    row: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of its documents, separators not counted."""
        return len(self.tokens) - len(self.offsets)

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, [L]."""
        return self.tokens[int(self.offsets[index]) : int(self.offsets[index + 1]) - 1]

    def plain(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens without separators, [n - D - 1], and where its documents begin and end in them, [D + 1] int64."""
        keep = np.ones(len(self.tokens), np.bool_)
        keep[self.offsets - 1] = False
        return self.tokens[keep], self.offsets - np.arange(1, len(self.offsets) + 1)


def build_segment(tokens: np.ndarray, offsets: np.ndarray, vocab_size: int, num_threads: int = 1) -> Segment:
    """Index documents in memory.

    Args:
        tokens: [n] integers, document after document, all in [0, vocab_size).
        offsets: [D + 1] int64; document d is `tokens[offsets[d]:offsets[d + 1]]`.

    Raises:
        DatastoreError: there are too many tokens, or one is outside the vocabulary.
    """
    if len(tokens) + len(offsets) > MAX_TOKENS:
        raise DatastoreError(f"A segment holds at most {MAX_TOKENS:,} tokens, not {len(tokens):,}; make smaller ones.")
    check_vocabulary(tokens, vocab_size)
    separated = _with_separators(tokens, offsets, token_dtype(vocab_size))
    bounds = offsets + np.arange(1, len(offsets) + 1)
    return _segment(separated, bounds, build_suffix(separated, vocab_size, num_threads))


def check_vocabulary(tokens: np.ndarray, vocab_size: int) -> None:
    """Refuses token ids, [n] integers, outside [0, vocab_size).

    Raises:
        DatastoreError: there is one.
    """
    if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
        outside = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise DatastoreError(f"Token id {outside} is outside the vocabulary of {vocab_size}; check the tokenizer.")


def write_segment(
    directory: Path,
    tokens: np.ndarray,
    offsets: np.ndarray,
    names: Sequence[str],
    *,
    vocab_size: int,
    num_threads: int,
    dense: tuple[np.ndarray, np.ndarray] | None = None,
) -> SegmentRecord:
    """Index documents and write them as a segment; its record comes last.

    Args:
        directory: below `segments/` of a datastore; made if absent. Its name is the segment's.
        tokens, offsets: see `build_segment`.
        names: one a document.
        dense: spans [P, 2] of passages in `tokens`, and their vectors [P, D].

    Raises:
        DatastoreError: see `build_segment`; or the files cannot be written.
    """
    if len(names) != len(offsets) - 1:
        raise DatastoreError(f"{len(names)} names were given for {len(offsets) - 1} documents; give one for each.")
    segment = build_segment(tokens, offsets, vocab_size, num_threads)
    encoded = [name.encode(errors="replace") for name in names]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    arrays = {
        _TOKENS: segment.tokens,
        _PLACES: segment.suffix.places,
        _BUCKETS: segment.suffix.buckets,
        _SAMPLES: segment.suffix.samples,
        _DOCUMENTS: segment.offsets,
        _NAMES: np.frombuffer(ends.tobytes() + b"".join(encoded), np.uint8),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RECORD).unlink(missing_ok=True)
        for name, array in arrays.items():
            write_array(directory / name, array)
        dense_names: Sequence[str] = ()
        if dense is not None:
            dense_names = write_dense(directory, _separated_spans(dense[0], offsets), dense[1])
        record = SegmentRecord(
            name=directory.name,
            tokens=segment.num_tokens,
            documents=len(names),
            passages=0 if dense is None else len(dense[0]),
            files=record_files(directory, [*arrays, *dense_names]),
        )
        fsync(directory.parent)
    except OSError as error:
        raise DatastoreError(
            f"the segment {directory} cannot be written: {error}. Free space there; the same command then goes on."
        ) from error
    write_record(directory, record)
    return record


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """A segment mapped from disk.

    Attributes:
        names: of its documents.
        dense: index of its passages, whose spans count in `segment.tokens`; None without one.
    """

    record: SegmentRecord
    segment: Segment
    names: Sequence[str]
    dense: DenseIndex | None

    @property
    def tokens(self) -> np.ndarray:
        return self.segment.tokens

    @property
    def offsets(self) -> np.ndarray:
        return self.segment.offsets

    def plain_spans(self) -> np.ndarray:
        """[P, 2] spans of the passages in the tokens that `segment.plain` gives."""
        assert self.dense is not None
        spans = np.asarray(self.dense.spans, np.int64)
        return spans - np.searchsorted(self.segment.offsets, spans[:, :1], side="right")

    def preload(self) -> None:
        """Brings the index into the page cache, as a cold page costs a lookup milliseconds, and checks that no place or
        bucket lies outside of it: lookups do not.

        Raises:
            DatastoreError: it is damaged.
        """
        suffix = self.segment.suffix
        for array in (suffix.places, self.tokens, suffix.samples, suffix.buckets):
            if isinstance(base := getattr(array, "_mmap", None), mmap.mmap):
                base.madvise(mmap.MADV_WILLNEED)
            np.bitwise_or.reduce(array.view(np.uint8)[::_PAGE], initial=0)
        last, first = int(suffix.places.max(initial=0)), int(suffix.places.min(initial=1))
        edges = {int(self.tokens[0]), int(self.tokens[-1])}
        is_sound = first >= 1 and last < max(len(self.tokens) - 1, 1) and edges == {separator(self.tokens.dtype)}
        if not is_sound or bool((suffix.buckets[1:] < suffix.buckets[:-1]).any()):
            raise DatastoreError(
                f"the index of segment {self.record.name} is damaged. `rasd datastore verify` tells which file; restore"
                " it, or build the segment again."
            )


def open_segment(store: Path, record: SegmentRecord, vocab_size: int, dimension: int | None = None) -> StoredSegment:
    """Map a segment; sizes were checked by the caller.

    Args:
        dimension: of its vectors; None leaves its dense index closed.

    Raises:
        DatastoreError: its files do not fit each other.
    """
    directory = store / SEGMENTS / record.name
    dtype = token_dtype(vocab_size)
    tokens = _mapped(directory / _TOKENS, dtype)
    places = _mapped(directory / _PLACES, np.dtype(np.uint32))
    buckets = _mapped(directory / _BUCKETS, np.dtype(np.uint32))
    samples = _mapped(directory / _SAMPLES, np.dtype(np.uint64))
    offsets = np.asarray(_mapped(directory / _DOCUMENTS, np.dtype(np.int64)))
    fits: Sequence[tuple[str, Callable[[], bool]]] = (
        (_DOCUMENTS, lambda: len(offsets) == record.documents + 1 and int(offsets[-1]) == len(tokens)),
        (_TOKENS, lambda: len(tokens) == record.tokens + record.documents + 1),
        (_BUCKETS, lambda: len(buckets) == vocab_size + 1 and int(buckets[-1]) == len(places)),
        (_SAMPLES, lambda: len(samples) == -(-len(places) // SAMPLE_STEP)),
    )
    for name, is_fitting in fits:
        if not is_fitting():
            raise DatastoreError(f"{directory / name} does not fit the segment's other files; build the segment again.")
    names = _Names(np.asarray(_mapped(directory / _NAMES, np.dtype(np.uint8))), record.documents)
    dense = None
    if dimension is not None:
        dense = DenseIndex.open(directory, record.passages, dimension)
    return StoredSegment(record, _segment(tokens, offsets, SuffixArrays(places, buckets, samples)), names, dense)


class _Names(Sequence[str]):
    """Document names, decoded when asked for."""

    def __init__(self, raw: np.ndarray, count: int) -> None:
        self._ends = raw[: 8 * (count + 1)].view(np.int64)
        self._text = raw[8 * (count + 1) :]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._text[int(self._ends[index]) : int(self._ends[index + 1])].tobytes().decode()


def _segment(tokens: np.ndarray, offsets: np.ndarray, suffix: SuffixArrays) -> Segment:
    return Segment(tokens, offsets, suffix, table_row(tokens, suffix.places, suffix.buckets, suffix.samples))


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise DatastoreError(f"{path} does not fit the segment's other files; build the segment again.")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)


def _with_separators(tokens: np.ndarray, offsets: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    separated = np.full(len(tokens) + len(offsets), separator(dtype), dtype)
    for d in range(len(offsets) - 1):
        begin, end = int(offsets[d]), int(offsets[d + 1])
        separated[begin + d + 1 : end + d + 1] = tokens[begin:end]
    return separated


def _separated_spans(spans: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Spans in the array with separators: each lies one further for every document's beginning up to its own."""
    document = np.searchsorted(offsets, spans[:, :1], side="right")
    shifted: np.ndarray = (spans.astype(np.int64) + document).astype(np.uint32)
    return shifted
