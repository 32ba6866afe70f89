"""The suffix index finds what a naive scan finds, for any documents and contexts, in any number of segments."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore.format import token_dtype
from datastore.lookup import LookupOptions, SegmentSet
from datastore.segment import Segment, build_segment
from datastore.suffix_build import SAMPLE_STEP, KeyLayout, build_suffix, separator
from pipeline.errors import DatastoreError
from tests.datastore.naive import Documents, arrays_of, counts_of, naive_lookup, trimmed

bounded = settings(deadline=None, max_examples=80)
EVERYTHING = LookupOptions(max_depth=6, max_samples=10_000, max_nodes=100_000)


@st.composite
def corpora(draw: st.DrawFn) -> tuple[int, list[Documents], list[list[int]]]:
    """A vocabulary of either width, segments of few distinct tokens, and contexts, half of them cut from documents."""
    vocab_size = draw(st.sampled_from([4, 300, 65_534, 65_535, 70_000]))  # the last two take four bytes a token
    ids = sorted({0, 1, vocab_size // 2, vocab_size - 1})[: draw(st.integers(1, 4))]
    tokens = st.sampled_from(ids)
    segments = draw(st.lists(st.lists(st.lists(tokens, max_size=30), max_size=8), min_size=1, max_size=4))
    contexts = draw(st.lists(st.lists(tokens, min_size=1, max_size=24), min_size=1, max_size=6))
    for document in [document for documents in segments for document in documents if document][:6]:
        contexts.append(list(document[: draw(st.integers(1, len(document)))]))
    return vocab_size, segments, contexts


def set_of(segments: Sequence[Documents], vocab_size: int, num_threads: int = 1) -> SegmentSet:
    built = [build_segment(*arrays_of(documents), vocab_size, num_threads) for documents in segments]
    return SegmentSet(built, token_dtype(vocab_size))


def int32(contexts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [np.array(context, np.int32) for context in contexts]


@bounded
@given(corpora(), st.sampled_from([1, 3, 10_000]))
def test_lookup_equals_a_naive_scan(corpus: tuple[int, list[Documents], list[list[int]]], max_samples: int) -> None:
    vocab_size, segments, contexts = corpus
    searched = set_of(segments, vocab_size)
    found = searched.lookup(int32(contexts), LookupOptions(6, max_samples, 100_000))
    assert found.match_lengths.dtype == found.tokens.dtype == found.parents.dtype == found.counts.dtype == np.int32
    for b, context in enumerate(contexts):
        length, counts = naive_lookup(segments, context, searched.depth, 6, max_samples)
        assert found.match_lengths[b] == length
        assert counts_of(found, b) == counts


@bounded
@given(corpora(), st.integers(0, 12))
def test_trimming_keeps_the_highest_counts_of_equal_ones_the_shallowest(
    corpus: tuple[int, list[Documents], list[list[int]]], max_nodes: int
) -> None:
    vocab_size, segments, contexts = corpus
    searched = set_of(segments, vocab_size)
    whole = searched.lookup(int32(contexts), EVERYTHING)
    found = searched.lookup(int32(contexts), LookupOptions(6, 10_000, max_nodes))
    for b in range(len(contexts)):
        all_counts, kept = counts_of(whole, b), counts_of(found, b)
        assert all(all_counts[path] == count for path, count in kept.items())
        assert trimmed(kept, max_nodes) == trimmed(all_counts, max_nodes)


@bounded
@given(corpora(), st.integers(1, 4))
def test_depths_and_shortest_match_bound_each_context(
    corpus: tuple[int, list[Documents], list[list[int]]], min_match: int
) -> None:
    vocab_size, segments, contexts = corpus
    searched = set_of(segments, vocab_size)
    depths = np.arange(len(contexts), dtype=np.int32) - 1
    found = searched.lookup(int32(contexts), LookupOptions(6, 10_000, 100_000, min_match), depths)
    for b, context in enumerate(contexts):
        length, counts = naive_lookup(segments, context, searched.depth, max(0, min(6, int(depths[b]))), 10_000)
        assert found.match_lengths[b] == (length if length >= min_match else 0)
        assert counts_of(found, b) == (counts if length >= min_match else {})


@bounded
@given(corpora())
def test_places_are_sorted_by_the_tokens_before_them(corpus: tuple[int, list[Documents], list[list[int]]]) -> None:
    vocab_size, segments, _ = corpus
    for documents in segments:
        segment = build_segment(*arrays_of(documents), vocab_size, num_threads=2)
        assert segment.suffix.places.tolist() == sorted(places_of(segment), key=lambda place: key_of(segment, place))
        plain = segment.plain()
        for built, given_ in zip(plain, arrays_of(documents), strict=True):
            assert built.tolist() == given_.tolist()
        assert [segment.document(d).tolist() for d in range(len(documents))] == [list(d) for d in documents]


def places_of(segment: Segment) -> list[int]:
    end = separator(segment.tokens.dtype)
    tokens = segment.tokens.tolist()
    return [i for i in range(len(tokens) - 1) if tokens[i] != end and tokens[i + 1] != end]


def key_of(segment: Segment, place: int) -> tuple[list[int], int]:
    end, depth = separator(segment.tokens.dtype), KeyLayout.of(segment.tokens.dtype).depth
    key: list[int] = []
    while len(key) < depth and segment.tokens[place - len(key)] != end:
        key.append(int(segment.tokens[place - len(key)]) + 1)
    return key, place


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
@pytest.mark.parametrize("kind", ["one token", "period of two", "few tokens", "skewed"])
def test_long_runs_of_equal_keys_are_sorted_too(vocab_size: int, kind: str) -> None:
    """Every branch of the sort: long equal runs, small runs, pivots of either kind, in 30,000 tokens."""
    random = np.random.default_rng(3)
    tokens = {
        "one token": np.zeros(30_000, np.int64),
        "period of two": np.tile([5, 9], 15_000),
        "few tokens": random.integers(0, 3, 30_000),
        "skewed": np.minimum(random.zipf(1.2, 30_000), vocab_size) - 1,
    }[kind]
    separated = np.concatenate([[-1], tokens[:20_000], [-1], tokens[20_000:], [-1]]).astype(token_dtype(vocab_size))
    once, again = build_suffix(separated, vocab_size, 1), build_suffix(separated, vocab_size, 2)
    assert once.places.tolist() == again.places.tolist(), "threads change nothing"
    segment = build_segment(tokens, np.array([0, 20_000, 30_000]), vocab_size)
    assert segment.suffix.places.tolist() == sorted(places_of(segment), key=lambda place: key_of(segment, place))
    assert len(once.samples) == -(-len(once.places) // SAMPLE_STEP)


def test_real_text_equals_a_naive_scan(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """Standard-library docstrings as documents; contexts from inside them, changed at every distance from the end."""
    texts = [module.__doc__ or "" for module in (json, np, pytest, st)]
    documents = [smollm2[1](text)["input_ids"][:700] for text in texts if text]
    searched = set_of([documents[:2], documents[2:]], 49_152)
    random = np.random.default_rng(0)
    contexts = []
    for document in documents:
        for end in random.integers(1, len(document), 30):
            context = document[max(0, end - 25) : end]
            if (changed := int(random.integers(0, 20))) < len(context):
                context[-1 - changed] = int(random.integers(0, 49_152))
            contexts.append(context)
    found = searched.lookup(int32(contexts), LookupOptions(8, 10_000, 100_000))
    assert len(set(found.match_lengths.tolist())) > 8, "matches of many lengths"
    for b, context in enumerate(contexts):
        length, counts = naive_lookup([documents[:2], documents[2:]], context, searched.depth, 8, 10_000)
        assert (found.match_lengths[b], counts_of(found, b)) == (length, counts)


def test_a_context_ends_at_its_last_negative_value_and_unknown_tokens_match_nothing() -> None:
    searched = set_of([[[1, 2, 3, 4]]], 10)
    found = searched.lookup(int32([[1, -1, 2, 3], [2, 3], [9], [10_000_000], [], [70_000, 2, 3]]), EVERYTHING)
    assert found.match_lengths.tolist() == [2, 2, 0, 0, 0, 2]
    assert counts_of(found, 0) == counts_of(found, 1)


def test_the_largest_ids_of_the_largest_vocabulary_are_told_apart() -> None:
    """21 bits a key digit: 2,097,149 + 1 is the largest that fits."""
    high = (1 << 21) - 3
    documents = [[high, high - 1, high, high - 2], [0, high, high - 1, high, 1], [high - 1, high, 0]]
    searched = set_of([documents], (1 << 21) - 2)
    contexts = [[high, high - 1, high], [0, high, high - 1, high], [high - 1], [high]]
    found = searched.lookup(int32(contexts), EVERYTHING)
    for b, context in enumerate(contexts):
        expected = naive_lookup([documents], context, searched.depth, 6, 10_000)
        assert (found.match_lengths[b], counts_of(found, b)) == expected
    with pytest.raises(DatastoreError, match="at most 2,097,150"):
        token_dtype((1 << 21) - 1)


def test_no_segments_and_no_contexts_give_nothing() -> None:
    assert len(set_of([], 10).lookup([], EVERYTHING)) == 0
    assert set_of([], 10).lookup(int32([[1, 2]]), EVERYTHING).match_lengths.tolist() == [0]
    assert set_of([[], [[]], [[7]]], 10).lookup(int32([[7]]), EVERYTHING).match_lengths.tolist() == [0]


@pytest.mark.parametrize("token", [-1, 10, 65_535])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(DatastoreError, match=f"{token} is outside the vocabulary of 10"):
        build_segment(np.array([1, token]), np.array([0, 2]), 10)
