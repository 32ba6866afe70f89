"""Whatever sequences come, share, grow and go: a page has one writer, shared pages hold what they say, none leaks."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.pages import PagePool, PageRun, block_table

Prefix = tuple[int, ...]


@dataclass
class Sequence:
    """One user of the pool: its tokens, how many of them are computed, and its pages."""

    tokens: list[int]
    cached: int = 0
    run: PageRun = field(default_factory=PageRun)

    @property
    def known(self) -> np.ndarray:
        return np.array(self.tokens, np.int32)


class Pages(RuleBasedStateMachine):
    """Sequences over two tokens, so that they share prefixes often; a model of what every page really holds."""

    @initialize(num_pages=st.integers(1, 8), page_size=st.integers(1, 7))
    def start(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.size = page_size
        self.content: dict[int, Prefix] = {}  # page -> the prefix its tokens end, itself included
        self.sequences: list[Sequence] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def come(self, tokens: list[int]) -> None:
        sequence = Sequence(tokens)
        self.sequences.append(sequence)
        self.share(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def share_again(self, data: st.DataObject) -> None:
        self.share(data.draw(st.sampled_from(self.sequences)))

    def share(self, sequence: Sequence) -> None:
        before = sequence.cached
        sequence.cached = self.pool.share(sequence.run, sequence.known, before)
        assert before <= sequence.cached < len(sequence.tokens) or sequence.cached == before
        if sequence.cached > before:
            assert len(sequence.run.pages) * self.size == sequence.cached, "room beside shared pages is kept"
        for i in range(sequence.cached // self.size):
            assert self.content[sequence.run.pages[i]] == tuple(sequence.tokens[: (i + 1) * self.size])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def borrow(self, data: st.DataObject) -> None:
        """Copies the beginning of a page; what is copied must be the sequence's own next tokens."""
        sequence = data.draw(st.sampled_from(self.sequences))
        before = sequence.cached
        copy = self.pool.borrow(sequence.run, sequence.known, before)
        if copy is None:
            return
        source, target, length = copy
        sequence.cached += length
        assert before < sequence.cached < len(sequence.tokens)
        prefix = tuple(sequence.tokens[: sequence.cached])
        assert source % self.size == 0 and target == sequence.run.pages[-1] * self.size
        assert self.content[source // self.size][: sequence.cached] == prefix
        self.content[target // self.size] = prefix

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), spare=st.integers(0, 4))
    def compute(self, data: st.DataObject, spare: int) -> None:
        """Grows for some tokens and some room for a tree, computes the tokens, publishes what is full."""
        sequence = data.draw(st.sampled_from(self.sequences))
        upto = data.draw(st.integers(sequence.cached, len(sequence.tokens)))
        pages, idle = list(sequence.run.pages), self.pool.num_idle
        missing = max(0, -(-(upto + spare) // self.size) - len(pages))
        if not self.pool.grow(sequence.run, upto + spare):
            assert missing > idle, "there were pages"
            assert list(sequence.run.pages) == pages and self.pool.num_idle == idle
            return
        assert self.pool.num_idle == idle - missing
        assert list(sequence.run.pages[: len(pages)]) == pages
        for index in range(sequence.cached, len(sequence.run.pages) * self.size):
            self.content[sequence.run.pages[index // self.size]] = tuple(
                sequence.tokens[: min((index // self.size + 1) * self.size, upto)]
            )
        sequence.cached = upto
        self.pool.publish(sequence.run, sequence.known[:upto])
        assert sequence.run.num_published == upto // self.size

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def extend(self, data: st.DataObject, tokens: list[int]) -> None:
        data.draw(st.sampled_from(self.sequences)).tokens += tokens

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        sequence = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.pool.release(sequence.run)
        assert sequence.run == PageRun()

    @invariant()
    def every_page_is_idle_or_used(self) -> None:
        if not hasattr(self, "pool"):
            return
        used = {page for sequence in self.sequences for page in sequence.run.pages}
        assert self.pool.num_idle == self.pool.num_pages - len(used)

    @invariant()
    def what_is_not_published_has_one_owner(self) -> None:
        if not hasattr(self, "pool"):
            return
        for sequence in self.sequences:
            run = sequence.run
            assert len(set(run.pages)) == len(run.pages)
            for other in self.sequences:
                if other is not sequence:
                    assert not set(run.pages[run.num_published :]) & set(other.run.pages)

    @invariant()
    def computed_tokens_are_still_there(self) -> None:
        if not hasattr(self, "pool"):
            return
        for sequence in self.sequences:
            for i in range(sequence.cached // self.size):
                assert self.content[sequence.run.pages[i]] == tuple(sequence.tokens[: (i + 1) * self.size])


TestPages = Pages.TestCase
TestPages.settings = settings(deadline=None, max_examples=80, stateful_step_count=30)


def computed(pool: PagePool, tokens: list[int]) -> PageRun:
    run = PageRun()
    assert pool.grow(run, len(tokens))
    pool.publish(run, np.array(tokens, np.int32))
    return run


def shared(pool: PagePool, tokens: list[int]) -> int:
    """How many leading tokens of a newcomer the pool has."""
    run = PageRun()
    found = pool.share(run, np.array(tokens, np.int32), 0)
    pool.release(run)
    return found


def test_finished_sequences_are_found_until_their_pages_are_needed() -> None:
    pool = PagePool(6, 2)
    pool.release(computed(pool, [1, 2, 3, 4, 5, 6]))
    assert pool.num_idle == 6
    assert shared(pool, [1, 2, 3, 4, 5, 6, 7]) == 6
    assert shared(pool, [1, 2, 3, 9, 9]) == 2
    everything = PageRun()
    assert pool.grow(everything, 12) and not pool.grow(PageRun(), 1)
    assert shared(pool, [1, 2, 3, 4, 5, 6, 7]) == 0


def test_never_used_pages_go_first_then_the_oldest_and_ends_before_beginnings() -> None:
    pool = PagePool(7, 1)
    pool.release(computed(pool, [1, 2, 3]))
    pool.release(computed(pool, [4, 5, 6]))
    found = []
    taken = PageRun()
    for n in range(1, 8):
        assert pool.grow(taken, n)
        # A look-up counts as a use, so the oldest is looked at last.
        found.append((shared(pool, [4, 5, 6, 0]), shared(pool, [1, 2, 3, 0])))
        pool.release(pool_touch(pool, [4, 5, 6, 0]))
    assert found == [(3, 3), (3, 2), (3, 1), (3, 0), (2, 0), (1, 0), (0, 0)]


def pool_touch(pool: PagePool, tokens: list[int]) -> PageRun:
    """Makes what is left of a sequence the most recently used."""
    run = PageRun()
    pool.share(run, np.array(tokens, np.int32), 0)
    return run


def test_the_last_token_is_always_left_to_compute() -> None:
    pool = PagePool(4, 2)
    run = computed(pool, [1, 2, 3, 4])
    assert shared(pool, [1, 2, 3, 4]) == 2
    assert shared(pool, [1, 2, 3, 4, 5]) == 4
    assert shared(pool, [1, 2]) == 0
    pool.release(run)


def test_equal_pages_after_different_beginnings_are_not_shared() -> None:
    pool = PagePool(8, 2)
    computed(pool, [1, 2, 7, 7])
    computed(pool, [3, 4])
    assert shared(pool, [3, 4, 7, 7, 0]) == 2


def test_two_who_computed_the_same_continue_one_chain() -> None:
    """Both computed the first page before either published it; what the second adds is found through the first."""
    pool = PagePool(8, 2)
    first, second = PageRun(), PageRun()
    assert pool.grow(first, 2) and pool.grow(second, 4)
    pool.publish(first, np.array([1, 2], np.int32))
    pool.publish(second, np.array([1, 2, 3, 4], np.int32))
    assert shared(pool, [1, 2, 3, 4, 5]) == 4
    pool.release(second)
    assert shared(pool, [1, 2, 3, 4, 5]) == 4


def test_a_partly_filled_page_is_not_shared_into() -> None:
    """A run that computed half of its next page goes on alone: sharing would throw its own tokens away."""
    pool = PagePool(8, 2)
    computed(pool, [1, 2, 4, 5])  # continues [1, 2] with the tokens that follow the run's half page
    run = PageRun()
    tokens = np.array([1, 2, 3, 4, 5, 6], np.int32)
    assert pool.share(run, tokens[:3], 0) == 2
    assert pool.grow(run, 3)
    assert pool.share(run, tokens, 3) == 3


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (32, 1), (33, 2)])
def test_pages_for_tokens(tokens: int, pages: int) -> None:
    assert PagePool(4, 32).pages_for(tokens) == pages


def test_block_table_pads_with_zero() -> None:
    assert block_table([PageRun.of([3, 1]), PageRun(), PageRun.of([2])]).tolist() == [[3, 1], [0, 0], [2, 0]]
    assert block_table([]).shape == (0, 0)
