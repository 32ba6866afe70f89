"""Building the suffix index: every place of a segment, sorted by the tokens that end there, read backwards.

A place is the index of a token that another token of the same document follows. Its key is the token itself and the
tokens before it, nearest first, up to `depth` of them or the document's start. Places of one last token form a bucket;
inside, keys are compared as packed 64-bit words by multikey quicksort (Bentley and Sedgewick 1997), in place: a build
takes 4 bytes a token for the places and 8 for the keys of the buckets at work. Equal keys stay in text order, so the
result depends on nothing but the tokens.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numba import njit

Integer: TypeAlias = Any  # of compiled code, where its width matters

SAMPLE_STEP = 64  # every so many places the first key word is stored, which replaces most of a binary search
_SMALL = 12  # runs up to this length are sorted by insertion
_TASKS_A_THREAD = 16


@dataclass(frozen=True, slots=True)
class KeyLayout:
    """How key tokens are packed into words; `per_word` times `bits` is at most 64."""

    words: int
    per_word: int
    bits: int

    @property
    def depth(self) -> int:
        """Tokens of a key, the bucket's own included."""
        return 1 + self.words * self.per_word

    @staticmethod
    def of(dtype: np.dtype[Any]) -> "KeyLayout":
        """17 tokens of uint16, 16 of uint32 (whose values must be below 2^21 - 1)."""
        return KeyLayout(4, 4, 16) if dtype.itemsize == 2 else KeyLayout(5, 3, 21)


@dataclass(frozen=True, slots=True)
class SuffixArrays:
    """The index of one segment.

    Attributes:
        places: [E] uint32, sorted by key.
        buckets: [V + 1] uint32; places of last token t are `places[buckets[t]:buckets[t + 1]]`.
        samples: [ceil(E / SAMPLE_STEP)] uint64 first key word of every `SAMPLE_STEP`th place.
    """

    places: np.ndarray
    buckets: np.ndarray
    samples: np.ndarray


def separator(dtype: np.dtype[Any]) -> int:
    """The value that stands before, between and after documents; as a key digit it is 0, below all tokens."""
    return int(np.iinfo(dtype).max)


def build_suffix(tokens: np.ndarray, vocab_size: int, num_threads: int) -> SuffixArrays:
    """Sort the places of a segment.

    Args:
        tokens: [n] uint16 or uint32, n < 2^32; a separator first, last, and between documents.
        vocab_size: V; tokens but separators are below it.
        num_threads: threads that sort buckets.
    """
    layout = KeyLayout.of(tokens.dtype)
    limit = separator(tokens.dtype)
    buckets = _bucket_bounds(tokens, limit, vocab_size)
    places = np.empty(int(buckets[-1]), np.uint32)
    _scatter(tokens, limit, buckets.copy(), places)

    def sort(bounds: tuple[int, int]) -> None:
        _sort_buckets(tokens, places, buckets, *bounds, layout.words, layout.per_word, layout.bits)

    if num_threads == 1:
        sort((0, vocab_size))
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(sort, _even_parts(buckets, num_threads * _TASKS_A_THREAD)))
    samples = _first_words(tokens, places[::SAMPLE_STEP], layout.per_word, layout.bits)
    return SuffixArrays(places, buckets.astype(np.uint32), samples)


def _even_parts(buckets: np.ndarray, parts: int) -> Sequence[tuple[int, int]]:
    """Ranges of buckets with about as many places each; the largest first, so that no thread ends long after others."""
    wanted = np.arange(1, parts) * (int(buckets[-1]) / parts)
    cuts = np.unique(np.concatenate([[0], np.searchsorted(buckets, wanted), [len(buckets) - 1]]))
    ranges = list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))
    return sorted(ranges, key=lambda part: int(buckets[part[0]]) - int(buckets[part[1]]))


@njit(cache=True, nogil=True)
def _bucket_bounds(tokens: np.ndarray, limit: int, vocab_size: int) -> np.ndarray:
    bounds = np.zeros(vocab_size + 1, np.int64)
    for i in range(len(tokens) - 1):
        if tokens[i] != limit and tokens[i + 1] != limit:
            bounds[tokens[i] + 1] += 1
    return np.cumsum(bounds)


@njit(cache=True, nogil=True)
def _scatter(tokens: np.ndarray, limit: int, cursors: np.ndarray, places: np.ndarray) -> None:
    for i in range(len(tokens) - 1):
        token = tokens[i]
        if token != limit and tokens[i + 1] != limit:
            places[cursors[token]] = i
            cursors[token] += 1


@njit(cache=True, nogil=True)
def key_word(tokens: np.ndarray, place: Integer, word: int, per_word: int, bits: int) -> Integer:
    """Key digits of one word: token + 1 each, nearest highest; 0 from the document's start on. Not for words after one
    that ends in 0: those are 0, and the tokens there belong to another document."""
    value, digit = np.uint64(0), np.uint64(1)
    at = place - 1 - word * per_word
    for i in range(per_word):
        if digit != 0:
            digit = np.uint64(tokens.dtype.type(tokens[at - i] + tokens.dtype.type(1)))
        value = (value << np.uint64(bits)) | digit
    return value


@njit(cache=True, nogil=True)
def _first_words(tokens: np.ndarray, places: np.ndarray, per_word: int, bits: int) -> np.ndarray:
    words = np.empty(len(places), np.uint64)
    for i in range(len(places)):
        words[i] = key_word(tokens, np.int64(places[i]), 0, per_word, bits)
    return words


@njit(cache=True, nogil=True)
def _sort_buckets(
    tokens: np.ndarray,
    places: np.ndarray,
    buckets: np.ndarray,
    first: int,
    last: int,
    words: int,
    per_word: int,
    bits: int,
) -> None:
    longest = 0
    for bucket in range(first, last):
        longest = max(longest, buckets[bucket + 1] - buckets[bucket])
    keys = np.empty(longest, np.uint64)
    stack = np.empty((128 * words, 3), np.int64)
    for bucket in range(first, last):
        if buckets[bucket + 1] - buckets[bucket] > 1:
            _sort_run(tokens, places[buckets[bucket] : buckets[bucket + 1]], keys, stack, words, per_word, bits)


@njit(cache=True, nogil=True)
def _sort_run(
    tokens: np.ndarray, places: np.ndarray, keys: np.ndarray, stack: np.ndarray, words: int, per_word: int, bits: int
) -> None:
    """Multikey quicksort of the places of one bucket; `keys` has the word being compared of each place."""
    last_digit = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for i in range(len(places)):
        keys[i] = key_word(tokens, np.int64(places[i]), 0, per_word, bits)
    top = 0
    stack[0, 0], stack[0, 1], stack[0, 2] = 0, len(places), 0
    while top >= 0:
        low, high, word = stack[top, 0], stack[top, 1], stack[top, 2]
        top -= 1
        if high - low <= _SMALL:
            _insertion_sort(tokens, places, keys, low, high, word, words, per_word, bits)
            continue
        pivot = _pivot(keys, low, high)
        begin, end = _partition(places, keys, low, high, pivot)
        # The shorter side is sorted first, so the stack grows by a logarithm only.
        sides = ((low, begin), (end, high)) if begin - low > high - end else ((end, high), (low, begin))
        for side in sides:
            if side[1] - side[0] > 1:
                top += 1
                stack[top, 0], stack[top, 1], stack[top, 2] = side[0], side[1], word
        if end - begin < 2:
            continue
        if word + 1 == words or pivot & last_digit == 0:
            places[begin:end].sort()
            continue
        for i in range(begin, end):
            keys[i] = key_word(tokens, np.int64(places[i]), word + 1, per_word, bits)
        top += 1
        stack[top, 0], stack[top, 1], stack[top, 2] = begin, end, word + 1


@njit(cache=True, nogil=True)
def _pivot(keys: np.ndarray, low: int, high: int) -> Integer:
    """Median of three, or of three such medians in a long run."""
    middle = (low + high) // 2
    if high - low < 256:
        return _median(keys[low], keys[middle], keys[high - 1])
    step = (high - low) // 8
    return _median(
        _median(keys[low], keys[low + step], keys[low + 2 * step]),
        _median(keys[middle - step], keys[middle], keys[middle + step]),
        _median(keys[high - 1 - 2 * step], keys[high - 1 - step], keys[high - 1]),
    )


@njit(cache=True, nogil=True)
def _median(a: Integer, b: Integer, c: Integer) -> Integer:
    if a < b:
        return b if b < c else max(a, c)
    return a if a < c else max(b, c)


@njit(cache=True, nogil=True)
def _partition(places: np.ndarray, keys: np.ndarray, low: int, high: int, pivot: Integer) -> tuple[int, int]:
    """Moves smaller keys to the front and larger ones to the back; returns the bounds of the equal ones."""
    begin, i, end = low, low, high
    while i < end:
        key = keys[i]
        if key < pivot:
            keys[i], keys[begin] = keys[begin], key
            places[i], places[begin] = places[begin], places[i]
            begin += 1
            i += 1
        elif key > pivot:
            end -= 1
            keys[i], keys[end] = keys[end], key
            places[i], places[end] = places[end], places[i]
        else:
            i += 1
    return begin, end


@njit(cache=True, nogil=True)
def _insertion_sort(
    tokens: np.ndarray,
    places: np.ndarray,
    keys: np.ndarray,
    low: int,
    high: int,
    word: int,
    words: int,
    per_word: int,
    bits: int,
) -> None:
    for i in range(low + 1, high):
        key, place = keys[i], places[i]
        j = i
        while j > low and (
            key < keys[j - 1]
            or (
                key == keys[j - 1]
                and _is_before(tokens, np.int64(place), np.int64(places[j - 1]), key, word, words, per_word, bits)
            )
        ):
            keys[j], places[j] = keys[j - 1], places[j - 1]
            j -= 1
        keys[j], places[j] = key, place


@njit(cache=True, nogil=True)
def _is_before(
    tokens: np.ndarray, a: Integer, b: Integer, key: Integer, word: int, words: int, per_word: int, bits: int
) -> bool:
    """Whether place a sorts before b, whose words up to `word` are equal, the last of them being `key`."""
    last_digit = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    while word + 1 < words and key & last_digit != 0:
        word += 1
        key = key_word(tokens, a, word, per_word, bits)
        other = key_word(tokens, b, word, per_word, bits)
        if key != other:
            return bool(key < other)
    return bool(a < b)
