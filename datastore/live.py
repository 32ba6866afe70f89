"""The live store: finished outputs of a running job, searchable at once, in bounded memory.

Built like a log-structured merge tree from the segments of the corpus: every append indexes what is new, together with
the youngest outputs if they are few; segments of one size are merged into a larger one. A lookup is therefore exact,
and the same compiled code as for the corpus.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datastore.format import SegmentRecord, token_dtype
from datastore.lookup import LookupOptions, SegmentSet
from datastore.segment import Segment, build_segment, write_segment
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
        kept = [np.asarray(sequence[-self._capacity // _SHARES :], np.int64) for sequence in sequences]
        with self._lock:
            tail = [*self._tail, *(sequence for sequence in kept if len(sequence))]
            youngest = self._index(tail)
            self._tail = tail
            if youngest.num_tokens >= _TAIL_TOKENS:
                self._sealed.append(youngest)
                self._tail = []
                self._compact()
            self._evict(0 if not self._tail else youngest.num_tokens)
            self._set = SegmentSet([*self._sealed, *([youngest] if self._tail else [])], self._dtype)

    def lookup(
        self, contexts: Sequence[np.ndarray], options: LookupOptions, depths: np.ndarray | None = None
    ) -> Lookup:
        """See `SegmentSet.lookup`."""
        return self._set.lookup(contexts, options, depths)

    def freeze(self, directory: Path, num_threads: int = 1) -> SegmentRecord:
        """Writes what can be found now as one segment of a datastore; see `write_segment` for errors."""
        tokens, offsets = _joined([segment.plain() for segment in self._set.segments], self._dtype)
        names = [f"live-{i}" for i in range(len(offsets) - 1)]
        return write_segment(directory, tokens, offsets, names, vocab_size=self._vocab_size, num_threads=num_threads)

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


def _size_class(tokens: int) -> int:
    return int(np.log(tokens / _TAIL_TOKENS) / np.log(_FAN_IN))


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of several segments one after the other: tokens and offsets without separators."""
    lengths = np.concatenate([np.empty(0, np.int64), *(np.diff(offsets) for _, offsets in parts)])
    tokens = np.concatenate([np.empty(0, dtype), *(tokens for tokens, _ in parts)])
    return tokens, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
