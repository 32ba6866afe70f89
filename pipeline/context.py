"""Context lookup: what followed the last tokens earlier in this prompt and output, as a tree of several candidates.

Passages found for a prompt stand before it in the same index, each ended by a negative value, which matches nothing.

A hash chain per slot links the earlier places of every bigram; a lookup follows at most `_MAX_LINKS` of them,
measures how far each matches backwards and merges what followed into a counted trie. After prompt lookup decoding
(Saxena 2023), with all matches instead of one and a length that follows the estimated acceptance.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit

from pipeline.acceptance import MAX_MATCH, AcceptanceTable, score
from pipeline.forest import Forest
from pipeline.proposal import SlotView
from pipeline.tree import SOURCES, renumbered

_MAX_LINKS = 256
_MAX_UNIGRAM_LINKS = 8
_MAX_CANDIDATES = 12
_MAX_NODES = 96
_MAX_DEPTH = 24
_BACK_OFF = 0.25  # weight of a match one token shorter than the longest
_CONTEXT = SOURCES.index("context")
_PASSAGES = SOURCES.index("passages")
_END = -1  # of a passage


class _SlotIndex:
    """Growing token buffer with bigram and unigram chains: `links[0 or 1, i]` is the previous place with the same
    key, or -1. The prompt begins at `origin`, after the passages. Places from `linked` on are not in the chains yet;
    the next lookup adds them, which a replica at rest does not make."""

    __slots__ = ("heads", "length", "linked", "links", "origin", "tokens")

    def __init__(self, capacity: int) -> None:
        capacity = 1 << max(8, (capacity - 1).bit_length())
        self.tokens = np.empty(capacity, np.int32)
        self.links = np.empty((2, capacity), np.int32)
        self.heads = np.full((2, capacity), -1, np.int32)
        self.length = 0
        self.linked = 0
        self.origin = 0

    def extend(self, tokens: np.ndarray) -> None:
        if self.length + len(tokens) > len(self.tokens):
            grown = _SlotIndex(2 * (self.length + len(tokens)))
            grown.tokens[: self.length] = self.tokens[: self.length]
            self.tokens, self.links, self.heads, self.linked = grown.tokens, grown.links, grown.heads, 0
        self.tokens[self.length : self.length + len(tokens)] = tokens
        self.length += len(tokens)


class ContextRetriever:
    """The sources `context` and `passages`: one index a slot, in this process, microseconds a lookup."""

    def __init__(self, acceptance: AcceptanceTable) -> None:
        self._acceptance = acceptance
        self._slots: dict[int, _SlotIndex] = {}

    def admit(self, slot: int, tokens: np.ndarray, passages: Sequence[np.ndarray]) -> None:
        index = _SlotIndex(2 * len(tokens) + sum(len(passage) + 1 for passage in passages))
        for passage in passages:
            index.extend(np.append(passage, np.int32(_END)))
        index.origin = index.length
        index.extend(tokens)
        self._slots[slot] = index

    def extend(self, slot: int, tokens: np.ndarray) -> None:
        self._slots[slot].extend(tokens)

    def release(self, slot: int) -> None:
        del self._slots[slot]

    @property
    def is_ready(self) -> bool:
        return True

    def send(self, views: Sequence[SlotView]) -> None:
        """Nothing to wait for."""

    def lookup(self, views: Sequence[SlotView]) -> Forest:
        room = len(views) * _MAX_NODES
        tokens, parents, scores = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.float32)
        sources, matches = np.empty(room, np.int8), np.empty(room, np.int16)
        begins = np.zeros(len(views) + 1, np.int64)
        end, rates = 0, self._acceptance.rates
        for place, view in enumerate(views):
            index, max_depth = self._slots[view.slot], min(view.max_depth, _MAX_DEPTH)
            if max_depth >= 1 and index.length >= 2:
                own = (index.tokens, index.links, index.heads, index.linked, index.length, index.origin)
                end = _look_up(*own, max_depth, rates, tokens, parents, scores, sources, matches, end)
                index.linked = index.length
            begins[place + 1] = end
        return Forest.proposed(tokens[:end], parents[:end], scores[:end], sources[:end], matches[:end], begins)


@njit(cache=True, nogil=True)
def _link(tokens: np.ndarray, links: np.ndarray, heads: np.ndarray, begin: int, end: int) -> None:
    """Adds places begin..end to the chains. Keys share buckets by hash; a lookup compares tokens."""
    mask = np.uint32(heads.shape[1] - 1)
    for i in range(begin, end):
        single = np.uint32(tokens[i]) * np.uint32(2654435761)
        pair = (single ^ (np.uint32(tokens[i - 1]) * np.uint32(2246822519))) if i else single
        for row, key in ((0, pair), (1, single)):
            bucket = (key ^ (key >> np.uint32(15))) & mask
            links[row, i] = heads[row, bucket]
            heads[row, bucket] = i


@njit(cache=True, nogil=True)
def _matches_of(tokens: np.ndarray, links: np.ndarray, length: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Places whose last `order` tokens equal the context's and which a token follows, most recent first, and how far
    each matches backwards."""
    last = length - 1
    places = np.empty(_MAX_LINKS, np.int32)
    lengths = np.empty(_MAX_LINKS, np.int32)
    found = 0
    place = links[2 - order, last]
    most = _MAX_LINKS if order == 2 else _MAX_UNIGRAM_LINKS
    for _ in range(_MAX_LINKS):
        if place < 0 or found == most:
            break
        match = 0
        while match < MAX_MATCH and match <= place:
            token = tokens[place - match]
            if token < 0 or token != tokens[last - match]:
                break
            match += 1
        if match >= order and tokens[place + 1] >= 0:
            places[found] = place
            lengths[found] = match
            found += 1
        place = links[2 - order, place]
    return places[:found], lengths[:found]


@njit(cache=True, nogil=True)
def _candidates(
    context: np.ndarray, links: np.ndarray, length: int, origin: int, max_depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Trie of what followed the best matches: tokens, parents, weights, match lengths, sources, [N] each."""
    places, lengths = _matches_of(context, links, length, 2)
    if len(places) == 0:
        places, lengths = _matches_of(context, links, length, 1)
    tokens = np.empty(_MAX_NODES, np.int32)
    parents = np.empty(_MAX_NODES, np.int32)
    weights = np.zeros(_MAX_NODES, np.float32)
    matches = np.zeros(_MAX_NODES, np.int16)
    sources = np.empty(_MAX_NODES, np.int8)
    size = 0
    longest = lengths.max() if len(lengths) else 0
    taken = 0
    for wanted in range(longest, 0, -1):
        for k in range(len(places)):
            if lengths[k] != wanted or taken == _MAX_CANDIDATES:
                continue
            taken += 1
            weight = np.float32(_BACK_OFF ** min(longest - wanted, 8))
            source = _CONTEXT if places[k] >= origin else _PASSAGES
            node = -1
            for depth in range(min(max_depth, length - 1 - places[k])):
                token = context[places[k] + 1 + depth]
                if token < 0:
                    break
                child = -1
                for j in range(node + 1, size):
                    if parents[j] == node and tokens[j] == token:
                        child = j
                        break
                if child < 0:
                    if size == _MAX_NODES:
                        break
                    child = size
                    size += 1
                    tokens[child] = token
                    parents[child] = node
                    sources[child] = source
                weights[child] += weight
                matches[child] = max(matches[child], min(wanted + depth, MAX_MATCH))
                node = child
    return tokens[:size], parents[:size], weights[:size], matches[:size], sources[:size]


@njit(cache=True, nogil=True)
def _look_up(
    context: np.ndarray,
    links: np.ndarray,
    heads: np.ndarray,
    linked: int,
    length: int,
    origin: int,
    max_depth: int,
    rates: np.ndarray,
    tokens: np.ndarray,
    parents: np.ndarray,
    scores: np.ndarray,
    sources: np.ndarray,
    matches: np.ndarray,
    begin: int,
) -> int:
    """Links what is new, and writes the scored candidates that are worth keeping from `begin` on; returns their end."""
    _link(context, links, heads, linked, length)
    found, above, weights, lengths, origins = _candidates(context, links, length, origin, max_depth)
    estimates, keep = score(above, weights, lengths, origins, rates)
    kept = np.flatnonzero(keep)
    own = slice(begin, begin + len(kept))
    tokens[own], parents[own], scores[own] = found[kept], renumbered(above, keep), estimates[kept]
    sources[own], matches[own] = origins[kept], lengths[kept]
    return begin + len(kept)
