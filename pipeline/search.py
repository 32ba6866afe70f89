"""The sources `corpus` and `live`: tries of what followed the longest match in text outside this request.

Where the text lies, and whether another process searches it, is the searcher's affair.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from pipeline.acceptance import MAX_MATCH, AcceptanceTable, score
from pipeline.lookup import Lookup
from pipeline.proposal import SlotView
from pipeline.tree import EMPTY_TREE, SOURCES, TokenTree, fuse, node_depths, prune


class Searcher(Protocol):
    """Searches one or more sources; never raises for a source that does not answer."""

    def send(self, contexts: Sequence[np.ndarray], depths: np.ndarray) -> None:
        """Starts looking up contexts, B arrays of [L] int32; depths: [B] int32 deepest node wanted of each."""
        ...

    def receive(self) -> Mapping[str, Lookup]:
        """What was found for the contexts sent last, by source; a source that did not answer in time is left out."""
        ...


class SearchRetriever:
    """A retriever over any number of searchers; keeps nothing of the slots."""

    def __init__(self, searchers: Sequence[Searcher], acceptance: AcceptanceTable) -> None:
        self._searchers = tuple(searchers)
        self._acceptance = acceptance

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

    def lookup(self, views: Sequence[SlotView]) -> Sequence[TokenTree]:
        if not views:
            return []
        found = [trees_of(source, lookup, self._acceptance.rates) for source, lookup in self._receive()]
        if not found:
            return [EMPTY_TREE] * len(views)
        return [fuse(trees) for trees in zip(*found, strict=True)]

    def _receive(self) -> list[tuple[str, Lookup]]:
        return [item for searcher in self._searchers for item in searcher.receive().items()]


def trees_of(source: str, lookup: Lookup, rates: np.ndarray) -> list[TokenTree]:
    """One scored tree for each context of a lookup.

    Args:
        rates: see `AcceptanceTable`.
    """
    sources = np.full(len(lookup.tokens), SOURCES.index(source), np.int8)
    trees = []
    for length, begin, end in zip(lookup.match_lengths, lookup.offsets[:-1], lookup.offsets[1:], strict=True):
        if begin == end:
            trees.append(EMPTY_TREE)
            continue
        part = slice(begin, end)
        parents = lookup.parents[part]
        matches = np.minimum(length + node_depths(parents) - 1, MAX_MATCH).astype(np.int16)
        scores, keep = score(parents, lookup.counts[part], matches, sources[part], rates)
        trees.append(prune(TokenTree(lookup.tokens[part], parents, scores, sources[part], matches), keep))
    return trees
