"""The sources `corpus` and `live`: tries of what followed the longest match in text outside this request.

Where the text lies, and whether another process searches it, is the searcher's affair.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from pipeline.acceptance import MAX_MATCH, AcceptanceTable, score
from pipeline.lookup import Lookup
from pipeline.proposal import SlotView
from pipeline.tree import EMPTY_TREE, SOURCES, TokenTree, fuse, node_depths, path_values, prune


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

    def lookup(self, views: Sequence[SlotView]) -> Sequence[TokenTree]:
        if not views:
            return []
        found = [self._trees(source, lookup) for source, lookup in self._receive()]
        if not found:
            return [EMPTY_TREE] * len(views)
        return [fuse(trees) for trees in zip(*found, strict=True)]

    def _trees(self, source: str, lookup: Lookup) -> list[TokenTree]:
        return trees_of(source, lookup, self._acceptance.rates, self._vocab_size)

    def _receive(self) -> list[tuple[str, Lookup]]:
        return [item for searcher in self._searchers for item in searcher.receive().items()]


def trees_of(source: str, lookup: Lookup, rates: np.ndarray, vocab_size: int) -> list[TokenTree]:
    """One scored tree for each context of a lookup.

    Args:
        rates: see `AcceptanceTable`.
        vocab_size: of the target; a tokenizer may have ids that it has not, whose nodes are left out.
    """
    sources = np.full(len(lookup.tokens), SOURCES.index(source), np.int8)
    # Copies: what Ray delivers is read-only, for which everything would be compiled once more.
    tokens, all_parents = np.array(lookup.tokens, np.int32), np.array(lookup.parents, np.int32)
    counts = np.array(lookup.counts, np.float32)
    trees = []
    for length, begin, end in zip(lookup.match_lengths, lookup.offsets[:-1], lookup.offsets[1:], strict=True):
        if begin == end:
            trees.append(EMPTY_TREE)
            continue
        part = slice(begin, end)
        parents = all_parents[part]
        matches = np.minimum(length + node_depths(parents) - 1, MAX_MATCH).astype(np.int16)
        scores, keep = score(parents, counts[part], matches, sources[part], rates)
        if (tokens[part] >= vocab_size).any():
            keep &= path_values(parents, (tokens[part] < vocab_size).astype(np.float32)) > 0
        trees.append(prune(TokenTree.proposed(tokens[part], parents, scores, sources[part], matches), keep))
    return trees
