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

    def to_bytes(self) -> bytes:
        """One buffer, which travels between processes faster than five arrays."""
        counts = np.array([len(self), len(self.tokens)], np.int64)
        arrays = (counts, self.offsets, self.match_lengths, self.tokens, self.parents, self.counts)
        return b"".join(array.tobytes() for array in arrays)

    @staticmethod
    def from_bytes(data: bytes) -> "Lookup":
        """What `to_bytes` was made of; the arrays are read-only."""
        num_contexts, total = np.frombuffer(data, np.int64, 2).tolist()
        offsets = np.frombuffer(data, np.int64, num_contexts + 1, 16)
        rest = np.frombuffer(data, np.int32, num_contexts + 3 * total, 16 + offsets.nbytes)
        matches, tokens, parents, counts = np.split(
            rest, [num_contexts, num_contexts + total, num_contexts + 2 * total]
        )
        return Lookup(matches, offsets, tokens, parents, counts)

    @staticmethod
    def empty(num_contexts: int) -> "Lookup":
        """Nothing found for any of the contexts."""
        none = np.empty(0, np.int32)
        return Lookup(np.zeros(num_contexts, np.int32), np.zeros(num_contexts + 1, np.int64), none, none, none)


def context_ends(contexts: Sequence[np.ndarray], depth: int) -> np.ndarray:
    """[B, depth] int32: the last tokens of contexts, [L] integers each, the newest last, shorter ones after -1s."""
    ends = np.full((len(contexts), depth), -1, np.int32)
    for row, context in zip(ends, contexts, strict=True):
        end = context[-depth:]
        row[depth - len(end) :] = end
    return ends


def context_tails(contexts: Sequence[np.ndarray] | np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The ends of contexts as search wants them.

    Args:
        contexts: one [L] integer array a context, the newest token last, or [B, L] of them. A negative value ends a
            context: only what comes after the last one counts.

    Returns:
        [B, depth] int32 with the newest token first, and [B] int32 how many are set.
    """
    ends = contexts[:, -depth:] if isinstance(contexts, np.ndarray) else context_ends(contexts, depth)
    tails = np.ascontiguousarray(ends[:, ::-1], np.int32)
    is_set = np.logical_and.accumulate(tails >= 0, axis=1)
    return tails, is_set.sum(axis=1, dtype=np.int32)
