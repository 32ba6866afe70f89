"""What a lookup should find, by looking at every place of every document."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.lookup import Lookup

Documents = Sequence[Sequence[int]]
Path = tuple[int, ...]


def match_length(document: Sequence[int], place: int, context: Sequence[int], depth: int) -> int:
    length = 0
    while length < min(depth, place + 1, len(context)) and document[place - length] == context[-1 - length]:
        length += 1
    return length


def naive_lookup(
    segments: Sequence[Documents], context: Sequence[int], depth: int, max_depth: int, max_samples: int
) -> tuple[int, Counter[Path]]:
    """Longest match, and how often each path followed the sampled places: evenly spaced over all of them, segment by
    segment, each sorted by the tokens before (nearest first, a document's start below all), then by position."""
    longest = 0
    places: list[tuple[int, tuple[int, ...], int, int]] = []
    for s, documents in enumerate(segments):
        for d, document in enumerate(documents):
            for place in range(len(document) - 1):
                length = match_length(document, place, context, depth)
                if length > longest:
                    longest, places = length, []
                if length == longest and length:
                    key = [token + 1 for token in reversed(document[max(0, place + 1 - depth) : place + 1])]
                    places.append((s, (*key, *[0] * (depth - len(key))), d, place))
    places.sort()
    counts: Counter[Path] = Counter()
    num = min(len(places), max_samples)
    for sample in range(num):
        s, _, d, place = places[sample * len(places) // num]
        followed = tuple(segments[s][d][place + 1 : place + 1 + max_depth])
        counts.update(followed[: i + 1] for i in range(len(followed)))
    return longest, counts


def counts_of(lookup: Lookup, b: int) -> Counter[Path]:
    """The trie of one context, its nodes by the path of tokens that leads to them; checks the order of nodes."""
    begin, end = int(lookup.offsets[b]), int(lookup.offsets[b + 1])
    paths: list[Path] = []
    found: Counter[Path] = Counter()
    for i in range(begin, end):
        parent = int(lookup.parents[i])
        assert -1 <= parent < i - begin
        path = (*(paths[parent] if parent >= 0 else ()), int(lookup.tokens[i]))
        assert path not in found, "siblings are distinct"
        paths.append(path)
        found[path] = int(lookup.counts[i])
    return found


def trimmed(counts: Counter[Path], max_nodes: int) -> list[tuple[int, int]]:
    """Counts and depths of the nodes that remain: which of several equal ones is left open."""
    ranked = sorted(((-count, len(path)) for path, count in counts.items()))
    return ranked[:max_nodes]


def arrays_of(documents: Documents) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets as `build_segment` takes them."""
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return np.array([token for document in documents for token in document], np.int64), offsets
