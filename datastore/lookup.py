"""The lookup that a datastore and a live store share: contexts against any number of segments in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datastore.segment import Segment
from datastore.suffix_build import KeyLayout
from datastore.suffix_search import search
from pipeline.lookup import Lookup, context_tails

CONTEXT_TOKENS = KeyLayout.of(np.dtype(np.uint16)).depth  # no match is longer
MAX_DEPTH = 16
MAX_SAMPLES = 32
MAX_NODES = 64


@dataclass(frozen=True, slots=True)
class LookupOptions:
    """How far a lookup goes.

    Attributes:
        max_depth: deepest node.
        max_samples: occurrences of the longest match whose continuations are counted, evenly spaced over all of them.
        max_nodes: most nodes of a context's trie; those with the highest counts are kept, of equal ones the shallowest.
        min_match: shorter matches are not worth a trie; their match length is reported as 0.
    """

    max_depth: int = MAX_DEPTH
    max_samples: int = MAX_SAMPLES
    max_nodes: int = MAX_NODES
    min_match: int = 1


class SegmentSet:
    """Segments searched together, oldest first; immutable, so any number of threads may search it."""

    def __init__(self, segments: Sequence[Segment], dtype: np.dtype[Any]) -> None:
        self.segments = tuple(segments)
        self._dtype = dtype
        self._table = np.array([segment.row for segment in segments], np.int64).reshape(len(segments), 8)

    @property
    def depth(self) -> int:
        """Longest match that is told from longer ones, in tokens."""
        return KeyLayout.of(self._dtype).depth

    def lookup(
        self, contexts: Sequence[np.ndarray] | np.ndarray, options: LookupOptions, depths: np.ndarray | None = None
    ) -> Lookup:
        """Longest match of each context and what followed it; one call without the GIL for the whole batch.

        Segments whose match is as long as the longest share the samples in proportion to their occurrences.

        Args:
            contexts: B arrays of token ids, [L] each, the newest last, or [B, L] of them; only the last `depth` are
                looked at.
            depths: [B] deepest node of each, if some need less than `options.max_depth`.
        """
        tails, lengths = context_tails(contexts, self.depth)
        wanted = np.broadcast_to(options.max_depth if depths is None else depths, len(contexts))
        return Lookup(
            *search(
                self._table,
                self._dtype,
                tails,
                lengths,
                np.clip(wanted, 0, options.max_depth).astype(np.int32),
                options.max_samples,
                options.max_nodes,
                options.min_match,
            )
        )
