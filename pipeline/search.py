"""The sources `corpus` and `live`: tries of what followed the longest match in text outside this request.

Where the text lies, and whether another process searches it, is the searcher's affair.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numba import njit

from pipeline.acceptance import MAX_MATCH, AcceptanceTable, score
from pipeline.forest import Forest, fuse_forests
from pipeline.lookup import Lookup
from pipeline.proposal import SlotView
from pipeline.tree import SOURCES, node_depths, renumbered


class Searcher(Protocol):
    """Searches one or more sources; never raises for a source that does not answer."""

    def send(self, contexts: Sequence[np.ndarray], depths: np.ndarray) -> None:
        """Starts looking up contexts, B arrays of [L] int32; depths: [B] int32 deepest node wanted of each."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether `receive` would answer without waiting for another process."""
        ...

    def receive(self) -> Mapping[str, Lookup]:
        """What was found for the contexts sent last, by source; a source that did not answer in time is left out."""
        ...


class SearchRetriever:
    """A retriever over any number of searchers; keeps nothing of the slots."""

    def __init__(self, searchers: Sequence[Searcher], acceptance: AcceptanceTable, vocab_size: int) -> None:
        self._searchers = tuple(searchers)
        self._acceptance = acceptance
        self._vocab_size = vocab_size
        one = np.zeros(1, np.int32)  # compiles, or loads what was compiled, before a round waits for it
        self._trees("live", Lookup(one, np.array([0, 1]), one, one - 1, one + 1))

    def admit(self, slot: int, tokens: np.ndarray, passages: Sequence[np.ndarray]) -> None:
        """Contexts come with each lookup."""

    def extend(self, slot: int, tokens: np.ndarray) -> None:
        """Contexts come with each lookup."""

    def release(self, slot: int) -> None:
        """Contexts come with each lookup."""

    def send(self, views: Sequence[SlotView]) -> None:
        if not views:
            return
        contexts = [view.tokens for view in views]
        depths = np.array([view.max_depth for view in views], np.int32)
        for searcher in self._searchers:
            searcher.send(contexts, depths)

    @property
    def is_ready(self) -> bool:
        return all(searcher.is_ready for searcher in self._searchers)

    def lookup(self, views: Sequence[SlotView]) -> Forest:
        found = [self._trees(source, lookup) for source, lookup in self._receive()] if views else []
        return fuse_forests(found) if found else Forest.empty(len(views))

    def _trees(self, source: str, lookup: Lookup) -> Forest:
        return trees_of(source, lookup, self._acceptance.rates, self._vocab_size)

    def _receive(self) -> list[tuple[str, Lookup]]:
        return [item for searcher in self._searchers for item in searcher.receive().items()]


def trees_of(source: str, lookup: Lookup, rates: np.ndarray, vocab_size: int) -> Forest:
    """One scored tree for each context of a lookup.

    Args:
        rates: see `AcceptanceTable`.
        vocab_size: of the target; a tokenizer may have ids that it has not, whose nodes are left out.
    """
    # Copies: what Ray delivers is read-only, for which everything would be compiled once more.
    tokens, parents = np.array(lookup.tokens, np.int32), np.array(lookup.parents, np.int32)
    counts, match_lengths = np.array(lookup.counts, np.float32), np.array(lookup.match_lengths, np.int32)
    columns = (tokens, parents, counts, match_lengths, np.array(lookup.offsets, np.int64))
    return Forest.proposed(*_trees_of(*columns, SOURCES.index(source), rates, vocab_size))


@njit(cache=True, nogil=True)
def _trees_of(
    tokens: np.ndarray,
    parents: np.ndarray,
    counts: np.ndarray,
    match_lengths: np.ndarray,
    offsets: np.ndarray,
    source: int,
    rates: np.ndarray,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, parents, scores, sources, match lengths and begins of a forest."""
    n = len(tokens)
    new_parents, scores = np.empty(n, np.int32), np.empty(n, np.float32)
    matches, sources = np.empty(n, np.int16), np.full(n, source, np.int8)
    keep = np.zeros(n, np.bool_)
    begins = np.zeros_like(offsets)
    for tree in range(len(match_lengths)):
        begin, end = offsets[tree], offsets[tree + 1]
        own = slice(begin, end)
        matches[own] = np.minimum(match_lengths[tree] + node_depths(parents[own]) - 1, MAX_MATCH)
        scores[own], keep[own] = score(parents[own], counts[own], matches[own], sources[own], rates)
        for i in range(begin, end):
            keep[i] = keep[i] and tokens[i] < vocab_size and (parents[i] < 0 or keep[begin + parents[i]])
        above = renumbered(parents[own], keep[own])
        begins[tree + 1] = begins[tree] + len(above)
        new_parents[begins[tree] : begins[tree + 1]] = above
    kept = np.flatnonzero(keep)
    return tokens[kept], new_parents[: len(kept)], scores[kept], sources[kept], matches[kept], begins
