"""The live store: finished outputs of a running job, searchable at once, in bounded memory.

Built like a log-structured merge tree from the segments of the corpus: every append indexes what is new, together with
the youngest outputs if they are few; segments of one size are merged into a larger one. A lookup is therefore exact,
and the same compiled code as for the corpus.
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datastore.format import SegmentRecord, token_dtype
from datastore.lookup import LookupOptions, SegmentSet
from datastore.segment import Segment, build_segment, check_vocabulary, write_segment
from pipeline.lookup import Lookup

DEFAULT_CAPACITY = 1 << 22
_TAIL_TOKENS = 1 << 14  # rebuilt in about 2 ms
_FAN_IN = 4
_SHARES = 8  # a merged segment holds at most this part of the capacity, and so does what one eviction loses


class LiveStore:
    """Searchable token sequences, the oldest evicted first. Appends are serialised; lookups never wait for them.

    Args:
        vocab_size: token ids are below it.
        capacity: most tokens kept; about 6 bytes each, and as much again while large segments merge.
    """

    def __init__(self, vocab_size: int, capacity: int = DEFAULT_CAPACITY) -> None:
        self._vocab_size = vocab_size
        self._capacity = max(capacity, _SHARES * _TAIL_TOKENS)
        self._dtype = token_dtype(vocab_size)
        self._lock = threading.Lock()
        self._sealed: list[Segment] = []
        self._tail: list[np.ndarray] = []
        self._set = SegmentSet((), self._dtype)
        self.lookup([np.zeros(1, np.int32)], LookupOptions())  # compiles, or loads what was compiled

    @property
    def num_tokens(self) -> int:
        """Tokens that can be found now."""
        return sum(segment.num_tokens for segment in self._set.segments)

    @property
    def num_sequences(self) -> int:
        """Sequences that can be found now."""
        return sum(len(segment.offsets) - 1 for segment in self._set.segments)

    def append(self, sequences: Sequence[np.ndarray]) -> None:
        """Makes token sequences, [L] integers each, findable; when it returns, they are.

        Raises:
            DatastoreError: a token is outside the vocabulary; nothing is added.
        """
        most = self._capacity // _SHARES
        kept = [np.asarray(sequence[-most:], np.int64) for sequence in sequences if len(sequence)]
        check_vocabulary(np.concatenate([np.empty(0, np.int64), *kept]), self._vocab_size)
        with self._lock:
            for piece in _pieces(kept, most - _TAIL_TOKENS):
                self._add(piece)

    def lookup(
        self, contexts: Sequence[np.ndarray] | np.ndarray, options: LookupOptions, depths: np.ndarray | None = None
    ) -> Lookup:
        """See `SegmentSet.lookup`."""
        return self._set.lookup(contexts, options, depths)

    def freeze(self, directory: Path, num_threads: int = 1) -> SegmentRecord:
        """Writes what can be found now as one segment of a datastore; see `write_segment` for errors."""
        tokens, offsets = _joined([segment.plain() for segment in self._set.segments], self._dtype)
        names = [f"live-{i}" for i in range(len(offsets) - 1)]
        return write_segment(directory, tokens, offsets, names, vocab_size=self._vocab_size, num_threads=num_threads)

    def _add(self, piece: Sequence[np.ndarray]) -> None:
        """Indexes sequences together with the tail, which they join or seal."""
        self._tail = [*self._tail, *piece]
        youngest = self._index(self._tail)
        if youngest.num_tokens >= _TAIL_TOKENS:
            self._sealed.append(youngest)
            self._tail = []
            self._compact()
        self._evict(youngest.num_tokens if self._tail else 0)
        self._set = SegmentSet([*self._sealed, *([youngest] if self._tail else [])], self._dtype)

    def _index(self, sequences: Sequence[np.ndarray]) -> Segment:
        offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
        tokens = np.concatenate([np.empty(0, np.int64), *sequences])
        return build_segment(tokens, offsets, self._vocab_size)

    def _compact(self) -> None:
        """Merges the youngest segments while enough of one size class stand side by side."""
        while len(self._sealed) >= _FAN_IN:
            youngest = self._sealed[-_FAN_IN:]
            size = sum(segment.num_tokens for segment in youngest)
            classes = {_size_class(segment.num_tokens) for segment in youngest}
            if len(classes) > 1 or size > self._capacity // _SHARES:
                return
            joined = _joined([segment.plain() for segment in youngest], self._dtype)
            self._sealed[-_FAN_IN:] = [build_segment(*joined, self._vocab_size)]

    def _evict(self, tail_tokens: int) -> None:
        total = tail_tokens + sum(segment.num_tokens for segment in self._sealed)
        while total > self._capacity and self._sealed:
            total -= self._sealed.pop(0).num_tokens


def _pieces(sequences: Sequence[np.ndarray], most: int) -> Iterator[Sequence[np.ndarray]]:
    """Runs of sequences of at most so many tokens, or of one sequence, so that eviction can take them singly."""
    piece: list[np.ndarray] = []
    size = 0
    for sequence in sequences:
        if piece and size + len(sequence) > most:
            yield piece
            piece, size = [], 0
        piece.append(sequence)
        size += len(sequence)
    if piece:
        yield piece


def _size_class(tokens: int) -> int:
    return int(np.log(tokens / _TAIL_TOKENS) / np.log(_FAN_IN))


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of several segments one after the other: tokens and offsets without separators."""
    lengths = np.concatenate([np.empty(0, np.int64), *(np.diff(offsets) for _, offsets in parts)])
    tokens = np.concatenate([np.empty(0, dtype), *(tokens for tokens, _ in parts)])
    return tokens, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
