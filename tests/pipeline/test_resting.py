"""When a replica rests: what is compared, how often it is tried, and that numbers of slots are judged apart."""

import numpy as np
import pytest

from pipeline.resting import Resting


def run(resting: Resting, num_rounds: int, speculation: float, rest: float, num_slots: int = 64) -> list[bool]:
    """Rounds of given worth; tells which of them were at rest."""
    rested = []
    for _ in range(num_rounds):
        rested.append(resting.begin_round(num_slots))
        resting.observe((rest if rested[-1] else speculation) * num_slots, num_slots)
    return rested


def test_speculation_that_clearly_pays_is_never_interrupted() -> None:
    assert not any(run(Resting(), 2000, speculation=1.5, rest=0.99))


def test_speculation_that_loses_a_little_gives_way_and_is_tried_ever_more_rarely() -> None:
    rested = run(Resting(), 20_000, speculation=0.94, rest=0.99)
    assert np.mean(rested[:1000]) > 0.85
    assert np.mean(rested) > 0.98
    assert not all(rested[10_000:])


@pytest.mark.parametrize(("num_slots", "latest"), [(16, 96), (40, 24), (64, 24)])
def test_with_many_slots_rest_comes_within_a_batch(num_slots: int, latest: int) -> None:
    """A batch of 64 tokens a slot is over in 45 rounds, all of which a cold replica lost by drafting."""
    rested = run(Resting(), 200, speculation=0.93, rest=0.99, num_slots=num_slots)
    assert np.mean(rested[latest:]) > 0.9


def test_rest_that_brings_less_is_tried_once() -> None:
    rested = run(Resting(), 5000, speculation=1.05, rest=0.99)
    assert 0 < sum(rested) < 50


def test_speculation_is_taken_up_again_once_it_pays() -> None:
    resting = Resting()
    run(resting, 500, speculation=0.9, rest=0.99)
    rested = run(resting, 2000, speculation=1.3, rest=0.99)
    assert not any(rested[1000:])


@pytest.mark.parametrize("other", [1, 8, 24])
def test_numbers_of_slots_are_judged_apart(other: int) -> None:
    resting = Resting()
    run(resting, 1000, speculation=0.9, rest=0.99)
    assert np.mean(run(resting, 100, speculation=0.9, rest=0.99, num_slots=60)) > 0.7  # about as many
    assert not any(run(resting, 100, speculation=1.5, rest=0.99, num_slots=other))
