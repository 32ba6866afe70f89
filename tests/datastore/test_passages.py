"""Passages cover every token of every document, are of full size where the document is, and cross no document's end."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.passages import passage_spans
from pipeline.errors import ConfigError


def naive_spans(lengths: list[int], size: int, overlap: int) -> list[list[int]]:
    """The rule, one document and one passage at a time."""
    spans, begin = [], 0
    for length in lengths:
        end = begin + length
        if 0 < length <= size:
            spans.append([begin, end])
        elif length > size:
            at = begin
            while at + size < end:
                spans.append([at, at + size])
                at += size - overlap
            spans.append([end - size, end])
        begin = end
    return spans


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], int, int]:
    size = draw(st.integers(1, 12))
    return draw(st.lists(st.integers(0, 50), max_size=20)), size, draw(st.integers(0, size - 1))


@given(cuts())
def test_equals_the_naive_loop(cut: tuple[list[int], int, int]) -> None:
    lengths, size, overlap = cut
    spans = passage_spans(np.cumsum([0, *lengths], dtype=np.int64), size, overlap)
    assert spans.dtype == np.uint32 and spans.shape == (len(spans), 2)
    assert spans.tolist() == naive_spans(lengths, size, overlap)


@given(cuts())
def test_covers_documents_within_their_ends(cut: tuple[list[int], int, int]) -> None:
    lengths, size, overlap = cut
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    spans = passage_spans(offsets, size, overlap).astype(np.int64)
    for begin, end in pairwise(offsets):
        inside = spans[(spans[:, 0] >= begin) & (spans[:, 1] <= end) & (begin < end)]
        covered = {token for a, b in inside for token in range(a, b)}
        assert covered == set(range(begin, end))
        assert all(b - a == min(size, end - begin) for a, b in inside)
        shared = inside[:-1, 1] - inside[1:, 0]
        assert (shared[:-1] == overlap).all() and (shared[-1:] >= overlap).all()
    assert len(spans) == len(naive_spans(lengths, size, overlap))  # none lies across two documents


def test_segment_beyond_two_billion_tokens() -> None:
    offsets = np.array([0, 3, 4_000_000_000], np.int64)
    spans = passage_spans(offsets, 1_000_000_000, 0)
    assert spans.tolist() == [
        [0, 3],
        [3, 1_000_000_003],
        [1_000_000_003, 2_000_000_003],
        [2_000_000_003, 3_000_000_003],
        [3_000_000_000, 4_000_000_000],
    ]


def test_a_million_documents_take_less_than_a_second() -> None:
    lengths = np.random.default_rng(0).integers(0, 400, 1_000_000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    begin = time.process_time()
    spans = passage_spans(offsets, 128, 32)
    assert time.process_time() - begin < 1.0
    assert len(spans) > 2_000_000


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (4, 4), (4, -1), (-2, -3)])
def test_an_impossible_cut_is_refused(size: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match=f"{size} tokens with an overlap of {overlap}"):
        passage_spans(np.array([0, 10]), size, overlap)
