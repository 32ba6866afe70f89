"""Where the device's memory ends in the middle of a round: fewer slots go on, and no output changes."""

from collections.abc import Set as AbstractSet

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import JobError
from pipeline.packing import Runs
from pipeline.target import Forward
from tests.pipeline.test_scheduler import GuessingRetriever, assert_plain, engine_of, request, run_all
from tests.pipeline.toys import ToyTarget


class StarvedTarget(ToyTarget):
    """Has no memory for more than `most_rows` rows, nor at the calls whose numbers are in `failing`."""

    def __init__(self, num_pages: int, page_size: int, most_rows: int, failing: AbstractSet[int] = frozenset()) -> None:
        super().__init__(num_pages, page_size)
        self.most_rows = most_rows
        self.num_failures = 0
        self._failing = failing
        self._calls = 0

    def forward(self, runs: Runs) -> Forward:
        found = super().forward(runs)  # memory may end when all is written
        self._call(runs.lengths.sum() > self.most_rows)
        return found

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        self._call(False)
        super().move(source, target)

    def _call(self, fails: bool) -> None:
        self._calls += 1
        if fails or self._calls in self._failing:
            self.num_failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_where_memory_ends_half_as_many_slots_go_on(data: st.DataObject) -> None:
    """Wherever in a round it ends: pages that were promised but never written must not be shared."""
    failing = data.draw(st.sets(st.integers(1, 30), max_size=1))
    toy = StarvedTarget(60, 4, most_rows=data.draw(st.integers(80, 400)), failing=failing)
    template = data.draw(st.lists(st.integers(0, 1), max_size=20))
    prompts = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=30), min_size=1, max_size=12))
    requests = [request(i, [*template, *prompt], 12) for i, prompt in enumerate(prompts)]
    guesser = GuessingRetriever(toy, 3)
    engine = engine_of(toy, (guesser,), 16, 512, 7, 100)
    engine.works_beside = data.draw(st.booleans())
    assert_plain(toy, requests, run_all(engine, requests, 2000), 100)
    assert engine._scheduler.num_slots == max(16 >> toy.num_failures, 1)
    assert engine._scheduler.pool.num_idle == 60
    assert not guesser.slots


def test_memory_for_not_even_one_slot_is_told() -> None:
    toy = StarvedTarget(60, 4, most_rows=0)
    engine = engine_of(toy, (), 16, 512, 7, 100)
    with pytest.raises(JobError, match=r"one slot.*Tried to allocate 2\.00 GiB"):
        run_all(engine, [request(0, [1, 2, 3], 4)], 50)
    assert engine._scheduler.num_slots == 1
