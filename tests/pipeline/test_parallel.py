"""Retrieval in another process goes on while the draft model drafts: its time does not add to the round's."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from benchmarks.reference import generate
from pipeline.acceptance import AcceptanceTable
from pipeline.budget import StepTimes
from pipeline.economy import Economy
from pipeline.engine import Engine, EngineConfig
from pipeline.head_pass import HeadPasses
from pipeline.lookup import Lookup
from pipeline.methods import Proposers
from pipeline.pace import Pace
from pipeline.proposal import Draft, SlotView
from pipeline.request import Request, SamplingParams
from pipeline.rules import Calibrated, Rule
from pipeline.search import SearchRetriever
from pipeline.tree import TokenTree
from tests.models import VOCABULARY, tiny_model
from tests.pipeline.test_engine_architectures import GREEDY, NEW_TOKENS, assert_equal, prompts_for, requests_for
from tests.pipeline.test_head import OPTIONS, engine_with, head_for
from tests.pipeline.toys import ToyDecoder, ToyTarget

LATENCY = 0.005
DRAFTING = 0.006
ROUNDS = 60


def found_for(num_contexts: int) -> Lookup:
    """Token 4 behind a match of nine tokens, for each context."""
    one = np.ones(num_contexts, np.int32)
    return Lookup(9 * one, np.arange(num_contexts + 1, dtype=np.int64), 4 * one, -one, one)


class SlowSearcher:
    """Answers `latency` seconds after it was asked, as another process would.

    Args:
        is_early: claims to be ready at once, so that the engine asks before it drafts: retrieval in series.
    """

    def __init__(self, latency: float, is_early: bool = False) -> None:
        self._latency = latency
        self._is_early = is_early
        self._asked = 0.0
        self._num_contexts = 0

    @property
    def is_ready(self) -> bool:
        return self._is_early

    def send(self, contexts: Sequence[np.ndarray], depths: np.ndarray) -> None:
        self._asked, self._num_contexts = time.perf_counter(), len(contexts)

    def receive(self) -> Mapping[str, Lookup]:
        time.sleep(max(self._asked + self._latency - time.perf_counter(), 0.0))
        return {"corpus": Lookup.empty(self._num_contexts)}


class SlowDrafter:
    """A draft pass that takes its time and finds one token."""

    def draft(self, views: Sequence[SlotView], pace: Pace) -> Draft:
        time.sleep(DRAFTING)
        return Draft([TokenTree.of([1], [-1], "draft")] * len(views))

    def release(self, slot: int) -> None:
        """It keeps nothing."""


def round_seconds(searcher: SlowSearcher) -> float:
    """Median seconds of a round."""
    toy = ToyTarget(16, 32)
    retriever = SearchRetriever([searcher], AcceptanceTable(), toy.vocabulary)
    config = EngineConfig(num_slots=1, budget=4, prefill_chunk=64, max_context=200)
    proposers = Proposers(SlowDrafter(), (retriever,), Rule())
    engine = Engine(toy, ToyDecoder(), [], proposers, AcceptanceTable(), config)  # type: ignore[arg-type]
    engine.submit(Request(0, (1, 2, 3), SamplingParams(max_new_tokens=ROUNDS)))
    seconds = []
    while engine.has_work:
        begin = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
    assert 0 < engine._overhead < max(seconds), "seconds of a commit: the budget is tuned by them"
    return float(np.median(seconds[2:]))


@pytest.mark.alone
def test_a_slow_search_costs_a_round_nothing_while_the_draft_model_works() -> None:
    without = round_seconds(SlowSearcher(0.0))
    beside, before = round_seconds(SlowSearcher(LATENCY)), round_seconds(SlowSearcher(LATENCY, is_early=True))
    assert without > DRAFTING
    if beside - without > 0.0005:  # another process may have had the core: once more
        without, beside = round_seconds(SlowSearcher(0.0)), round_seconds(SlowSearcher(LATENCY))
    assert beside - without <= 0.0005
    assert before - without >= 0.004


@pytest.mark.parametrize("is_early", [True, False])
def test_an_answer_is_used_whether_it_comes_before_or_behind_the_draft(is_early: bool) -> None:
    class Sure(SlowSearcher):
        def receive(self) -> Mapping[str, Lookup]:
            return {"corpus": found_for(self._num_contexts)}

    toy = ToyTarget(16, 32)
    retriever = SearchRetriever([Sure(0.0, is_early)], AcceptanceTable(), toy.vocabulary)
    config = EngineConfig(num_slots=1, budget=4, prefill_chunk=64, max_context=200)
    engine = Engine(  # type: ignore[arg-type]
        toy, ToyDecoder(), [], Proposers(SlowDrafter(), (retriever,), Rule()), AcceptanceTable(), config
    )
    (done,) = engine.generate([Request(0, (1, 2, 3), SamplingParams(max_new_tokens=30))])
    assert list(done.token_ids) == toy.continuation((1, 2, 3), 30)
    assert done.accepted_by_source.get("corpus", 0) > 0 < done.accepted_by_source.get("draft", 0)


class Counting:
    """A searcher in this process that says when it searches."""

    is_ready = True

    def __init__(self, events: list[str]) -> None:
        self._events = events
        self._num_contexts = 0

    def send(self, contexts: Sequence[np.ndarray], depths: np.ndarray) -> None:
        self._num_contexts = len(contexts)

    def receive(self) -> Mapping[str, Lookup]:
        self._events.append("search")
        return {"corpus": found_for(self._num_contexts)}


class Listening(SearchRetriever):
    """Says when it is told of new output."""

    def __init__(self, events: list[str]) -> None:
        super().__init__([Counting(events)], AcceptanceTable(), VOCABULARY)
        self._events = events

    def extend(self, slot: int, tokens: np.ndarray) -> None:
        self._events.append("extend")


@pytest.mark.parametrize("is_beside", [True, False])
def test_searches_and_notes_are_made_while_a_device_computes_the_first_level(
    is_beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    original = HeadPasses.run

    def run(*arguments: Any) -> Any:
        events.append("level")
        return original(*arguments)

    monkeypatch.setattr(HeadPasses, "run", run)
    retriever = Listening(events)
    rule = Calibrated(Economy(StepTimes((1, 64), (0.05, 0.051)), OPTIONS.depth))
    engine = engine_with("llama", head_for("llama"), 2, OPTIONS, retrievers=(retriever,), rule=rule)
    engine.works_beside = is_beside
    prompts = prompts_for(5, 2)
    done = sorted(engine.generate(requests_for(prompts, GREEDY)), key=lambda generation: generation.request_id)
    expected = [generate(tiny_model("llama"), prompt, NEW_TOKENS) for prompt in prompts]
    assert_equal("llama", requests_for(prompts, GREEDY), expected, done)
    assert events.count("search") > 5
    assert events[:3] == (["level", "extend", "search"] if is_beside else ["extend", "search", "level"])
