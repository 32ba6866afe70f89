"""The live store: what was appended is found at once, exactly, within its memory; the oldest goes first."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.format import Manifest, write_manifest
from datastore.live import LiveStore
from datastore.lookup import LookupOptions
from datastore.store import Datastore
from pipeline.errors import DatastoreError
from tests.datastore.naive import counts_of, naive_lookup

VOCABULARY = 5000
SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=20), max_size=6)


@settings(deadline=None, max_examples=60)
@given(st.lists(SEQUENCES, max_size=6), st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_everything_appended_is_found_as_a_naive_scan_finds_it(
    appends: list[list[list[int]]], context: list[int]
) -> None:
    live = LiveStore(VOCABULARY)
    for sequences in appends:
        live.append([np.array(sequence, np.int32) for sequence in sequences])
    known = [sequence for sequences in appends for sequence in sequences]
    found = live.lookup([np.array(context, np.int32)], LookupOptions(6, 10_000, 100_000))
    length, counts = naive_lookup([known], context, 17, 6, 10_000)
    assert (found.match_lengths[0], counts_of(found, 0)) == (length, counts)
    assert live.num_tokens == sum(map(len, known))


def marked(number: int, size: int = 300) -> np.ndarray:
    """A sequence that begins with a pair found nowhere else, and ends with the number."""
    filler = np.random.default_rng(number).integers(0, 50, size)
    return np.concatenate([[1000 + number // 1000, 2000 + number % 1000, 3000 + number % 100], filler]).astype(np.int32)


def is_known(live: LiveStore, number: int) -> bool:
    pair = marked(number)[:2]
    return int(live.lookup([pair], LookupOptions()).match_lengths[0]) == 2


def test_memory_is_bounded_and_the_oldest_is_evicted_first() -> None:
    capacity = 200_000
    live = LiveStore(VOCABULARY, capacity)
    most = 0
    for number in range(1500):
        live.append([marked(number)])
        most = max(most, live.num_tokens)
        assert is_known(live, number)
    assert capacity * 0.8 < most <= capacity
    known = [number for number in range(1500) if is_known(live, number)]
    assert known == list(range(known[0], 1500)), "only the oldest are gone"
    assert len(known) * 303 > capacity * 0.75


def test_one_append_of_more_than_the_capacity_keeps_the_newest() -> None:
    """A restarted service appends at once what a job has committed. All of it used to go with one eviction."""
    capacity = 1 << 17
    live = LiveStore(VOCABULARY, capacity)
    live.append([marked(number) for number in range(600)])
    assert capacity * 0.75 < live.num_tokens <= capacity
    known = [number for number in range(600) if is_known(live, number)]
    assert known == list(range(known[0], 600)) and len(known) > 300
    live.append([np.arange(200_000) % VOCABULARY])
    assert 0 < live.num_tokens <= capacity


def test_segments_stay_few_while_it_grows() -> None:
    live = LiveStore(VOCABULARY, 4_000_000)
    for number in range(1500):
        live.append([marked(number)])
    assert live.num_sequences == 1500
    assert len(live._set.segments) <= 12
    assert all(is_known(live, number) for number in range(0, 1500, 37))


def test_lookups_go_on_while_it_is_appended_to() -> None:
    live = LiveStore(VOCABULARY)
    live.append([marked(0)])
    stop, wrong = threading.Event(), []

    def search() -> None:
        while not stop.is_set():
            if not is_known(live, 0):
                wrong.append(0)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(1, 120):
        live.append([marked(number)])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_refused_append_adds_nothing() -> None:
    live = LiveStore(VOCABULARY)
    with pytest.raises(DatastoreError, match="outside the vocabulary"):
        live.append([np.array([1, 2, 3]), np.array([VOCABULARY])])
    assert live.num_tokens == 0
    live.append([np.array([1, 2, 3])])
    assert live.num_tokens == 3


def test_a_frozen_live_store_is_a_segment_with_the_same_answers(tmp_path: Path) -> None:
    live = LiveStore(VOCABULARY)
    for number in range(100):
        live.append([marked(number)])
    record = live.freeze(tmp_path / "segments" / "live")
    write_manifest(tmp_path, Manifest("hash", VOCABULARY, None, (record,)))
    store = Datastore.open(tmp_path, tokenizer="hash")
    contexts = [marked(number)[: 2 + number % 30] for number in range(100)]
    options = LookupOptions(8, 10_000, 100_000)
    mine = live.lookup(contexts, options)
    stored = store.lookup(contexts, max_depth=8, max_samples=10_000, max_nodes=100_000)
    assert mine.match_lengths.tolist() == stored.match_lengths.tolist()
    assert [counts_of(mine, b) for b in range(100)] == [counts_of(stored, b) for b in range(100)]
