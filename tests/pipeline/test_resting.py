"""When a replica rests: what is compared, how often it is tried, and that numbers of slots are judged apart."""

import numpy as np
import pytest

from pipeline.acceptance import AcceptanceTable
from pipeline.budget import StepTimes
from pipeline.context import ContextRetriever
from pipeline.economy import Economy
from pipeline.engine import Engine, EngineConfig
from pipeline.methods import Proposers
from pipeline.proposal import NullDrafter
from pipeline.request import Request, SamplingParams
from pipeline.resting import Resting
from pipeline.rules import Calibrated
from tests.pipeline.toys import ToyDecoder, ToyTarget

CHEAP = StepTimes((1, 64, 128), (0.04, 0.05, 0.06))  # rows cost little beside the pass
DEAR = StepTimes((1, 64, 128), (0.04, 0.08, 0.12))  # twice the rows, half as long again


def run(resting: Resting, num_rounds: int, speculation: float, rest: float, num_slots: int = 64) -> list[bool]:
    """Rounds of given worth; tells which of them were at rest."""
    rested = []
    for _ in range(num_rounds):
        rested.append(resting.begin_round(num_slots))
        resting.observe((rest if rested[-1] else speculation) * num_slots, num_slots)
    return rested


def test_speculation_that_clearly_pays_is_never_interrupted() -> None:
    assert not any(run(Resting(CHEAP), 2000, speculation=1.5, rest=0.99))


def test_speculation_that_loses_a_little_gives_way_and_is_tried_ever_more_rarely() -> None:
    rested = run(Resting(CHEAP), 20_000, speculation=0.94, rest=0.99)
    assert np.mean(rested[:1000]) > 0.85
    assert np.mean(rested) > 0.98
    assert not all(rested[10_000:])


@pytest.mark.parametrize(("num_slots", "latest"), [(16, 96), (40, 24), (64, 24)])
def test_with_many_slots_rest_comes_within_a_batch(num_slots: int, latest: int) -> None:
    """A batch of 64 tokens a slot is over in 45 rounds, all of which a cold replica lost by drafting."""
    rested = run(Resting(CHEAP), 200, speculation=0.93, rest=0.99, num_slots=num_slots)
    assert np.mean(rested[latest:]) > 0.9


@pytest.mark.parametrize(("num_slots", "times", "begins"), [(64, DEAR, True), (64, CHEAP, False), (16, DEAR, False)])
def test_many_slots_begin_at_rest_where_rows_are_dear(num_slots: int, times: StepTimes, begins: bool) -> None:
    """A cold batch of 40 prompts of 64 tokens lost a tenth by drafting before rest was tried."""
    rested = run(Resting(times), 100, speculation=0.93, rest=0.99, num_slots=num_slots)
    assert rested[0] == begins
    assert all(rested) == begins


@pytest.mark.parametrize(("speculation", "share"), [(0.93, 0.95), (1.3, 0.2)])
def test_a_rest_from_the_beginning_is_left_where_speculation_pays(speculation: float, share: float) -> None:
    rested = run(Resting(DEAR), 2000, speculation=speculation, rest=0.99)
    assert all(rested[:100]) and not all(rested[100:200]), "it is tried all the same"
    assert abs(np.mean(rested) - share) < 0.15


def test_drafters_follow_before_the_first_trial_only() -> None:
    resting = Resting(DEAR)
    follows = []
    for _ in range(140):
        resting.begin_round(64)
        follows.append(resting.follows)
        resting.observe(60, 64)
    assert not any(follows[:60]) and all(follows[70:])


@pytest.mark.parametrize("times", [DEAR, CHEAP])
def test_rounds_that_teach_nothing_do_not_hold_a_replica_at_rest(times: StepTimes) -> None:
    """Beside long prompts no round may be fit to compare."""
    resting = Resting(times)
    if times is CHEAP:
        run(resting, 16, speculation=1.0, rest=0.99)
    rested = [resting.begin_round(64) for _ in range(1000)]
    assert rested[0] and sum(rested) == 128


def test_before_long_rests_end_drafters_follow_for_longer() -> None:
    resting = Resting(DEAR)
    run_ups, count = [], 0
    for _ in range(4000):
        is_resting = resting.begin_round(64)
        if is_resting and resting.follows:
            count += 1
        elif not is_resting and count:
            run_ups.append(count)
            count = 0
        resting.observe((0.99 if is_resting else 0.9) * 64, 64)
    assert run_ups[:4] == [65, 65, 129, 257]


def test_rest_that_brings_less_is_tried_once() -> None:
    rested = run(Resting(CHEAP), 5000, speculation=1.05, rest=0.99)
    assert 0 < sum(rested) < 50


def test_speculation_is_taken_up_again_once_it_pays() -> None:
    resting = Resting(CHEAP)
    run(resting, 500, speculation=0.9, rest=0.99)
    rested = run(resting, 2000, speculation=1.3, rest=0.99)
    assert not any(rested[1000:])


@pytest.mark.parametrize("other", [1, 8, 24])
def test_numbers_of_slots_are_judged_apart(other: int) -> None:
    resting = Resting(CHEAP)
    run(resting, 1000, speculation=0.9, rest=0.99)
    assert np.mean(run(resting, 100, speculation=0.9, rest=0.99, num_slots=60)) > 0.7  # about as many
    assert not any(run(resting, 100, speculation=1.5, rest=0.99, num_slots=other))


class Alternating(Resting):
    """Rests every other round, and keeps what it is told by kind of round."""

    def __init__(self) -> None:
        super().__init__(CHEAP)
        self.num_rounds = 0
        self.slots: list[int] = []
        self.tokens: dict[bool, list[float]] = {False: [], True: []}

    @property
    def is_resting(self) -> bool:
        return self.num_rounds % 2 == 0

    def begin_round(self, num_slots: int) -> bool:
        self.num_rounds += 1
        self.slots.append(num_slots)
        return self.is_resting

    def observe(self, tokens: float, plain_tokens: float) -> None:
        self.tokens[self.is_resting].append(tokens)


@pytest.mark.parametrize("is_beside", [False, True])
@pytest.mark.parametrize(("num_pages", "most"), [(40, 4), (8, 2)])
def test_a_round_is_booked_on_its_own_kind(is_beside: bool, num_pages: int, most: int) -> None:
    """Whenever that is done; and no request counts that memory keeps waiting."""
    toy, acceptance, economy = ToyTarget(num_pages, 16, vocabulary=3), AcceptanceTable(), Economy(CHEAP, 3)
    resting = economy.resting = Alternating()
    proposers = Proposers(NullDrafter(), (ContextRetriever(acceptance),), Calibrated(economy))
    config = EngineConfig(num_slots=4, budget=8, prefill_chunk=64, max_context=128)
    times = StepTimes((1, 64), (0.05, 0.0501))
    engine = Engine(toy, ToyDecoder(), [], proposers, acceptance, config, times)  # type: ignore[arg-type]
    engine.works_beside = is_beside
    requests = [Request(i, (1, 2, i % 3), SamplingParams(max_new_tokens=60)) for i in range(6)]
    assert all(len(done.token_ids) == 60 for done in engine.generate(requests))
    assert set(resting.tokens[True]) <= set(range(5)), "a slot at rest emits one token a round"
    assert np.mean(resting.tokens[False]) > 1.5 * np.mean(resting.tokens[True])
    assert np.median(resting.slots) <= most
