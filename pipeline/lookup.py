"""What a search in token text returns: for each context its longest match, and a counted trie of what followed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Lookup:
    """Results of a batch of B contexts; the trie of context b is `[offsets[b]:offsets[b + 1]]` of the node arrays.

    Attributes:
        match_lengths: [B] int32 tokens of the context's end that were found, 0 for none.
        offsets: [B + 1] int64.
        tokens: [total] int32.
        parents: [total] int32, numbered within the context's own trie, before their children; -1 is the root.
        counts: [total] int32 how many of the sampled occurrences went on through this node.
    """

    match_lengths: np.ndarray
    offsets: np.ndarray
    tokens: np.ndarray
    parents: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.match_lengths)

    @staticmethod
    def empty(num_contexts: int) -> "Lookup":
        """Nothing found for any of the contexts."""
        none = np.empty(0, np.int32)
        return Lookup(np.zeros(num_contexts, np.int32), np.zeros(num_contexts + 1, np.int64), none, none, none)


def context_tails(contexts: Sequence[np.ndarray], depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The ends of contexts as search wants them.

    Args:
        contexts: one [L] integer array a context, the newest token last. A negative value ends it: only what comes
            after the last one counts.

    Returns:
        [B, depth] int32 with the newest token first, and [B] int32 how many are set.
    """
    tails = np.full((len(contexts), depth), -1, np.int32)
    for tail, context in zip(tails, contexts, strict=True):
        end = context[-depth:]
        tail[: len(end)] = end[::-1]
    is_set = np.logical_and.accumulate(tails >= 0, axis=1)
    return tails, is_set.sum(axis=1, dtype=np.int32)
