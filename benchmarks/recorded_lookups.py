"""What a datastore found for known contexts, to be replayed where neither the datastore nor its packages are."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.lookup import Lookup, context_ends


class RecordedLookups:
    """A searcher of the source `corpus`; finds nothing for contexts that were not recorded.

    Args:
        ends: [B, depth] int32 last tokens of each context, see `pipeline.lookup.context_ends`.
        lookup: what was found for each.
    """

    def __init__(self, ends: np.ndarray, lookup: Lookup) -> None:
        self._ends = ends
        self._lookup = lookup
        self._rows = {end.tobytes(): row for row, end in enumerate(ends)}
        self._asked: np.ndarray = ends[:0]

    def __len__(self) -> int:
        return len(self._rows)

    @staticmethod
    def record(contexts: Sequence[np.ndarray], depth: int, search: Callable[[np.ndarray], Lookup]) -> "RecordedLookups":
        """Searches once for every different end of `depth` tokens.

        Args:
            contexts: [L] int32 each.
            search: of [B, depth] ends.
        """
        ends = np.unique(context_ends(contexts, depth), axis=0)
        return RecordedLookups(ends, search(ends))

    def save(self, path: Path) -> None:
        """One .npz file; raises OSError."""
        found = self._lookup
        np.savez_compressed(
            path,
            ends=self._ends,
            match_lengths=found.match_lengths,
            offsets=found.offsets,
            tokens=found.tokens,
            parents=found.parents,
            counts=found.counts,
        )

    @staticmethod
    def load(path: Path) -> "RecordedLookups":
        """What `save` wrote; raises OSError, KeyError or ValueError for another file."""
        with np.load(path) as file:
            arrays = dict(file)
        return RecordedLookups(arrays.pop("ends"), Lookup(**arrays))

    def send(self, contexts: Sequence[np.ndarray], depths: np.ndarray) -> None:
        """See `pipeline.search.Searcher`; what is deeper than wanted comes along, and is never accepted."""
        self._asked = context_ends(contexts, self._ends.shape[1])

    @property
    def is_ready(self) -> bool:
        return True

    def receive(self) -> Mapping[str, Lookup]:
        """See `pipeline.search.Searcher`."""
        found, whole = [self._rows.get(end.tobytes()) for end in self._asked], self._lookup
        spans = [slice(0, 0) if row is None else slice(*whole.offsets[row : row + 2].tolist()) for row in found]
        return {
            "corpus": Lookup(
                np.array([0 if row is None else whole.match_lengths[row] for row in found], np.int32),
                np.cumsum([0, *(span.stop - span.start for span in spans)]),
                *(
                    np.concatenate([np.empty(0, np.int32), *(column[span] for span in spans)])
                    for column in (whole.tokens, whole.parents, whole.counts)
                ),
            )
        }
