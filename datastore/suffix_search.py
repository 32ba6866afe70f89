"""Looking contexts up in any number of segments: the longest match, and a counted trie of what followed it.

One compiled call serves a whole batch without the GIL. Segments reach it as a table of addresses, so that their number
is no matter of types and a call costs no conversion; the caller keeps the arrays alive.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numba
import numpy as np
from numba import njit
from numba.extending import intrinsic

from datastore.suffix_build import SAMPLE_STEP, Integer, KeyLayout

# Numba is typed in part, and its intrinsics with the signature of what compiles them, not with that of their calls.
carray: Any = cast(Any, numba).carray
types: Any = cast(Any, numba).types
_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = cast(Any, intrinsic)

Array: TypeAlias = Any  # one that compiled code makes of an address

# Columns of the segment table, [G, 8] int64.
TOKENS, PLACES, BUCKETS, SAMPLES, NUM_TOKENS, NUM_PLACES, NUM_BUCKETS, NUM_SAMPLES = range(8)


def table_row(tokens: np.ndarray, places: np.ndarray, buckets: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """A segment's row of the table; the arrays must outlive it."""
    arrays = (tokens, places, buckets, samples)
    return np.array([array.ctypes.data for array in arrays] + [len(array) for array in arrays], np.int64)


@_intrinsic
def _pointer(context: Any, address: Any) -> Any:
    """An integer as an untyped pointer."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), code


@njit(cache=True, nogil=True)
def _tokens(table: np.ndarray, g: int, like: np.ndarray) -> Array:
    return carray(_pointer(table[g, TOKENS]), (table[g, NUM_TOKENS],), like.dtype)


@njit(cache=True, nogil=True)
def _places(table: np.ndarray, g: int) -> Array:
    return carray(_pointer(table[g, PLACES]), (table[g, NUM_PLACES],), np.uint32)


@njit(cache=True, nogil=True)
def _compare(tokens: np.ndarray, place: Integer, query: np.ndarray, depth: int) -> tuple[int, bool]:
    """Tokens that a place's key shares with the query from the front, and whether the place sorts before the query."""
    one = tokens.dtype.type(1)
    for i in range(depth):
        digit = np.int64(tokens.dtype.type(tokens[place - i] + one))
        if digit != query[i]:  # a digit of a query is never 0, so a document's start ends every match
            return i, digit < query[i]
    return depth, False


@njit(cache=True, nogil=True)
def _near(samples: np.ndarray, low: int, high: int, word: Integer, step: int) -> tuple[int, int]:
    """Narrows places low..high of a bucket to where the first key word can be `word`, by the sampled words."""
    first, last = (low + step - 1) // step, (high + step - 1) // step
    a, b = first, last
    while a < b:
        middle = (a + b) // 2
        if samples[middle] < word:
            a = middle + 1
        else:
            b = middle
    c, d = a, last
    while c < d:
        middle = (c + d) // 2
        if samples[middle] <= word:
            c = middle + 1
        else:
            d = middle
    return max(low, (a - 1) * step), min(high, c * step)


@njit(cache=True, nogil=True)
def _find(
    tokens: np.ndarray,
    places: np.ndarray,
    samples: np.ndarray,
    low: Integer,
    high: Integer,
    query: np.ndarray,
    word: Integer,
) -> tuple[int, int, int]:
    """Longest match of a query in its bucket low..high: its length, and the bounds of the places that have it."""
    depth = len(query)
    a, b = _near(samples, low, high, word, SAMPLE_STEP)
    while a < b:
        middle = (a + b) // 2
        _, is_before = _compare(tokens, np.int64(places[middle]), query, depth)
        if is_before:
            a = middle + 1
        else:
            b = middle
    length = 0
    if a < high:
        length, _ = _compare(tokens, np.int64(places[a]), query, depth)
    if a > low:
        length = max(length, _compare(tokens, np.int64(places[a - 1]), query, depth)[0])
    if length == 1:
        return 1, low, high
    begin = _gallop(tokens, places, low, a, -1, query, length)
    end = _gallop(tokens, places, a, high, 1, query, length)
    return length, begin, end


@njit(cache=True, nogil=True)
def _gallop(
    tokens: np.ndarray, places: np.ndarray, low: int, high: int, direction: int, query: np.ndarray, length: int
) -> int:
    """Where places that share `length` tokens with the query end, going up from low or down from high."""
    size = high - low
    if size == 0:
        return low
    origin = low if direction > 0 else high - 1
    inside, outside, step = 0, size, 1  # the first `inside` places have it; of `outside` and beyond none has
    while inside + step <= size:
        place = places[origin + direction * (inside + step - 1)]
        if _compare(tokens, np.int64(place), query, length)[0] < length:
            outside = inside + step - 1
            break
        inside += step
        step *= 2
    while inside < outside:
        middle = (inside + outside) // 2
        if _compare(tokens, np.int64(places[origin + direction * middle]), query, length)[0] < length:
            outside = middle
        else:
            inside = middle + 1
    return low + inside if direction > 0 else high - inside


@njit(cache=True, nogil=True)
def _longest(
    table: np.ndarray, like: np.ndarray, context: np.ndarray, per_word: int, bits: int, found: np.ndarray
) -> int:
    """Longest match of one context over all segments.

    Args:
        context: [n] int32, the last token first, all of the vocabulary, n at most the depth of keys.
        found: [G, 2] filled with the bounds of the places that have it; empty where a segment's match is shorter.
    """
    query = np.zeros(len(context), np.int64)
    word = np.uint64(0)
    for i in range(len(context)):
        query[i] = context[i] + 1
    for i in range(1, per_word + 1):
        digit = np.uint64(query[i]) if i < len(query) else np.uint64(0)
        word = (word << np.uint64(bits)) | digit
    best = 0
    for g in range(len(table)):
        found[g, 0] = found[g, 1] = 0
        buckets = carray(_pointer(table[g, BUCKETS]), (table[g, NUM_BUCKETS],), np.uint32)
        samples = carray(_pointer(table[g, SAMPLES]), (table[g, NUM_SAMPLES],), np.uint64)
        low, high = np.int64(buckets[context[0]]), np.int64(buckets[context[0] + 1])
        if low == high:
            continue
        length, begin, end = _find(_tokens(table, g, like), _places(table, g), samples, low, high, query, word)
        if length > best:
            best = length
            found[:g] = 0
        if length == best:
            found[g, 0], found[g, 1] = begin, end
    return best


@njit(cache=True, nogil=True)
def _grow(
    table: np.ndarray,
    like: np.ndarray,
    found: np.ndarray,
    max_depth: int,
    max_samples: int,
    trie: np.ndarray,
) -> int:
    """The trie of what followed evenly spaced samples of the found places.

    Args:
        trie: [capacity, 6] int32, filled: token, parent, count, depth, first child, next sibling. Returns its size.
    """
    limit = np.iinfo(like.dtype).max
    total = 0
    for g in range(len(found)):
        total += found[g, 1] - found[g, 0]
    num = min(total, max_samples)
    size, root_child, g, before = 0, -1, 0, 0
    for sample in range(num):
        rank = sample * total // num
        while rank - before >= found[g, 1] - found[g, 0]:
            before += found[g, 1] - found[g, 0]
            g += 1
        tokens = _tokens(table, g, like)
        at = np.int64(_places(table, g)[found[g, 0] + rank - before]) + 1
        node = -1
        for depth in range(1, max_depth + 1):
            token = tokens[at]
            if token == limit:
                break
            at += 1
            first = root_child if node < 0 else trie[node, 4]
            child = first
            while child >= 0 and trie[child, 0] != token:
                child = trie[child, 5]
            if child < 0:
                child = size
                size += 1
                trie[child, 0], trie[child, 1], trie[child, 2], trie[child, 3] = token, node, 0, depth
                trie[child, 4], trie[child, 5] = -1, first
                if node < 0:
                    root_child = child
                else:
                    trie[node, 4] = child
            trie[child, 2] += 1
            node = child
    return size


@njit(cache=True, nogil=True)
def _trim(
    trie: np.ndarray, size: int, max_nodes: int, tokens: np.ndarray, parents: np.ndarray, counts: np.ndarray
) -> int:
    """Copies the nodes with the highest counts, of equal ones the shallowest, of those the first; returns how many.

    A parent has no lower count and less depth than its child, so it is always kept with it.
    """
    deepest, highest = 0, 0
    for i in range(size):
        deepest = max(deepest, trie[i, 3])
        highest = max(highest, trie[i, 2])
    room = np.full((highest + 1, deepest + 1), 0, np.int32)  # nodes to keep of each count and depth
    for i in range(size):
        room[trie[i, 2], trie[i, 3]] += 1
    left = max_nodes
    for count in range(highest, 0, -1):
        for depth in range(1, deepest + 1):
            room[count, depth] = min(room[count, depth], left)
            left -= room[count, depth]
    kept = 0
    for i in range(size):
        if room[trie[i, 2], trie[i, 3]] == 0:
            continue
        room[trie[i, 2], trie[i, 3]] -= 1
        tokens[kept], counts[kept] = trie[i, 0], trie[i, 2]
        parents[kept] = trie[trie[i, 1], 4] if trie[i, 1] >= 0 else -1
        trie[i, 4] = kept  # children come later and read their parent's new number here
        kept += 1
    return kept


@njit(cache=True, nogil=True)
def _search(
    table: np.ndarray,
    like: np.ndarray,
    contexts: np.ndarray,
    lengths: np.ndarray,
    depths: np.ndarray,
    max_samples: int,
    max_nodes: int,
    min_match: int,
    per_word: int,
    bits: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    num = len(contexts)
    matches = np.zeros(num, np.int32)
    offsets = np.zeros(num + 1, np.int64)
    tokens = np.empty(num * max_nodes, np.int32)
    parents = np.empty(num * max_nodes, np.int32)
    counts = np.empty(num * max_nodes, np.int32)
    found = np.zeros((len(table), 2), np.int64)
    vocab_size = table[0, NUM_BUCKETS] - 1 if len(table) else 0
    deepest = 0
    for b in range(num):
        deepest = max(deepest, depths[b])
    trie = np.empty((max_samples * deepest, 6), np.int32)
    for b in range(num):
        kept = known = 0
        while known < lengths[b] and contexts[b, known] < vocab_size:  # another id occurs nowhere, and has no key digit
            known += 1
        if known > 0:
            length = _longest(table, like, contexts[b, :known], per_word, bits, found)
            if length >= min_match:
                matches[b] = length
                size = _grow(table, like, found, depths[b], max_samples, trie)
                at = offsets[b]
                kept = _trim(trie, size, max_nodes, tokens[at:], parents[at:], counts[at:])
        offsets[b + 1] = offsets[b] + kept
    total = offsets[num]
    return matches, offsets, tokens[:total].copy(), parents[:total].copy(), counts[:total].copy()


def search(
    table: np.ndarray,
    dtype: np.dtype[Any],
    contexts: np.ndarray,
    lengths: np.ndarray,
    depths: np.ndarray,
    max_samples: int,
    max_nodes: int,
    min_match: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Looks a batch up.

    Args:
        table: [G, 8] int64, rows of `table_row`, all with tokens of `dtype`.
        contexts: [B, C] int32, the last token first, C at most the depth of keys; lengths: [B] int32, how many of each
            count, none of them negative.
        depths: [B] int32 deepest node wanted of each.

    Returns:
        match lengths [B], offsets [B + 1], and of all nodes tokens, parents (-1 for the root's children) and counts.
    """
    layout = KeyLayout.of(dtype)
    like = np.empty(0, dtype)
    return _search(
        table, like, contexts, lengths, depths, max_samples, max_nodes, min_match, layout.per_word, layout.bits
    )
