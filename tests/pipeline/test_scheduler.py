"""Slots, pages and rounds together: whatever the pool and the trees, every request comes out once, with plain text.

The target is a toy whose next token depends on the whole prefix as the pages hold it, so any mistake with pages,
shared prefixes or accepted nodes changes an output or trips a check of the toy.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.acceptance import AcceptanceTable
from pipeline.context import ContextRetriever
from pipeline.engine import Engine, EngineConfig
from pipeline.errors import RowError
from pipeline.forest import Forest
from pipeline.methods import Proposers
from pipeline.pages import PagePool
from pipeline.proposal import NullDrafter, Retriever, SlotView
from pipeline.request import Generation, Request, SamplingParams
from pipeline.scheduler import Scheduler, Work
from pipeline.slots import Slot
from pipeline.stopping import StopCheck
from pipeline.target import Target
from pipeline.tree import EMPTY_TREE, TokenTree
from tests.pipeline.toys import ToyDecoder, ToyTarget


class GuessingRetriever:
    """Knows the toy's continuation and hides it among wrong siblings; checks that it is told all that happens."""

    def __init__(self, toy: ToyTarget, seed: int) -> None:
        self._toy = toy
        self._random = np.random.default_rng(seed)
        self.slots: dict[int, list[int]] = {}

    def admit(self, slot: int, tokens: np.ndarray, passages: Sequence[np.ndarray]) -> None:
        assert slot not in self.slots
        self.slots[slot] = tokens.tolist()

    def extend(self, slot: int, tokens: np.ndarray) -> None:
        self.slots[slot] += tokens.tolist()

    def release(self, slot: int) -> None:
        del self.slots[slot]

    @property
    def is_ready(self) -> bool:
        return bool(len(self.sent) % 2)

    def send(self, views: Sequence[SlotView]) -> None:
        self.sent = [view.slot for view in views]

    def lookup(self, views: Sequence[SlotView]) -> Sequence[TokenTree]:
        assert self.sent == [view.slot for view in views]
        for view in views:
            assert view.tokens.tolist() == self.slots[view.slot]
        return [self._guess(view) for view in views]

    def _guess(self, view: SlotView) -> TokenTree:
        tokens: list[int] = []
        parents: list[int] = []
        known, node = view.tokens.tolist(), -1
        for _ in range(min(view.max_depth, int(self._random.integers(0, 5)))):
            right = self._toy.next_token(known)
            siblings = self._random.permutation(self._toy.vocabulary)[: int(self._random.integers(1, 4))].tolist()
            begin = len(tokens)
            tokens += siblings
            parents += [node] * len(siblings)
            if right not in siblings:
                break
            node = begin + siblings.index(right)
            known.append(right)
        return TokenTree.of(tokens, parents, "corpus", [0.5] * len(tokens))


def engine_of(
    toy: ToyTarget, retrievers: Sequence[Retriever], num_slots: int, prefill_chunk: int, budget: int, max_context: int
) -> Engine:
    config = EngineConfig(num_slots, budget, prefill_chunk, max_context)
    proposers = Proposers(NullDrafter(), tuple(retrievers))
    return Engine(cast(Target, toy), ToyDecoder(), [], proposers, AcceptanceTable(), config)


def request(number: int, prompt: Sequence[int], length: int) -> Request:
    return Request(number, tuple(prompt), SamplingParams(max_new_tokens=length))


def run_all(engine: Engine, requests: Sequence[Request], max_rounds: int) -> list[Generation]:
    for item in requests:
        engine.submit(item)
    finished: list[Generation] = []
    for _ in range(max_rounds):
        if not engine.has_work:
            return finished
        finished += engine.step()
    raise AssertionError(f"{len(finished)} of {len(requests)} requests after {max_rounds} rounds")


def assert_plain(toy: ToyTarget, requests: Sequence[Request], finished: Sequence[Generation], max_context: int) -> None:
    """Each request once, with the tokens of plain decoding and counts that add up."""
    assert sorted(generation.request_id for generation in finished) == [item.request_id for item in requests]
    for generation in finished:
        asked = requests[generation.request_id]
        length = min(asked.params.max_new_tokens, max_context - len(asked.prompt_ids))
        assert list(generation.token_ids) == toy.continuation(asked.prompt_ids, length)
        assert generation.finish_reason == "length"
        assert generation.num_prompt_tokens == len(asked.prompt_ids)
        assert generation.accepted == sum(generation.accepted_by_source.values()) <= generation.drafted
        # The token after the prompt comes with prefill; a round gives its accepted tokens and a bonus, unless cut.
        rounds = generation.rounds + generation.accepted
        assert rounds - 1 <= length - 1 <= rounds
        assert generation.rounds_without_draft <= generation.rounds


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_every_request_ends_once_with_plain_text_in_any_pool(data: st.DataObject) -> None:
    page_size, num_pages = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 12))
    max_context = min(max(2, page_size * num_pages), 60)
    toy = ToyTarget(num_pages, page_size, vocabulary=data.draw(st.integers(2, 5)))
    templates = data.draw(st.lists(st.lists(st.integers(0, 1), max_size=max_context), min_size=1, max_size=3))
    prompt = st.builds(
        lambda template, rest: (template + rest)[: max_context - 1],
        st.sampled_from(templates),
        st.lists(st.integers(0, toy.vocabulary - 1), min_size=1, max_size=6),
    )
    prompts = data.draw(st.lists(st.tuples(prompt, st.integers(1, 25)), min_size=1, max_size=8))
    requests = [request(i, tokens, length) for i, (tokens, length) in enumerate(prompts)]
    guesser = GuessingRetriever(toy, data.draw(st.integers(0, 99)))
    retrievers: Sequence[Retriever] = data.draw(
        st.sampled_from(
            [(), (guesser,), (ContextRetriever(AcceptanceTable()),), (guesser, ContextRetriever(AcceptanceTable()))]
        )
    )
    num_slots, chunk, budget = (data.draw(st.integers(1, high)) for high in (6, 16, 10))
    engine = engine_of(toy, retrievers, num_slots, chunk, budget, max_context)
    engine.works_beside = data.draw(st.booleans())
    most_rounds = sum(len(item.prompt_ids) + item.params.max_new_tokens for item in requests)
    finished = run_all(engine, requests, 10 + 4 * most_rounds)
    assert_plain(toy, requests, finished, max_context)
    assert toy.longest_prefill <= chunk
    assert not guesser.slots
    assert engine._scheduler.pool.num_idle == num_pages
    again = [request(0, requests[0].prompt_ids, 5)]
    assert_plain(toy, again, run_all(engine, again, 500), max_context)


def drive(scheduler: Scheduler, toy: ToyTarget, trees: dict[int, TokenTree] | None = None) -> Work:
    """One round of plain decoding, as the engine does it; trees by slot number are planned for, and not walked."""
    scheduler.admit()
    work = scheduler.plan(list(trees or {}), Forest.of(list((trees or {}).values())))
    toy.forward(work.runs)
    chunks = zip(work.slots, work.runs.num_known.tolist(), work.runs.wants_logits.tolist(), strict=True)
    for slot, num_known, wants_logits in chunks:
        slot.cached += num_known
        if wants_logits:
            slot.extend(np.array([toy.next_token(slot.known.tolist())]), None)
        scheduler.pool.publish(slot.pages, slot.known[: slot.cached])
    for slot in work.slots:
        if slot.finish_reason is not None:
            scheduler.finish(slot)
    return work


def slots_of(*prompts: Sequence[int], length: int) -> list[Slot]:
    params = SamplingParams(max_new_tokens=length)
    stop = StopCheck(params, length, (), ToyDecoder())
    return [Slot.of(Request(i, tuple(prompt), params), stop) for i, prompt in enumerate(prompts)]


def numbers(work: Work) -> list[int]:
    return sorted(slot.request.request_id for slot in work.slots)


def test_the_youngest_gives_way_and_comes_back_with_its_output() -> None:
    toy = ToyTarget(num_pages=6, page_size=2)
    scheduler = Scheduler(3, PagePool(6, 2), 64, ())
    slots = slots_of([0, 0, 1], [1, 0, 0], [2, 2, 2], length=6)
    for slot in slots:
        scheduler.submit(slot)
    ended: list[int] = []
    outputs: dict[int, int] = {}
    for _ in range(60):
        active = [slot for slot in slots if slot.number >= 0]
        work = drive(scheduler, toy)
        gone = [slot for slot in active if slot.number < 0 and slot.finish_reason is None]
        stayed = [slot.order for slot in active if slot.number >= 0]
        assert all(slot.order > max(stayed, default=-1) for slot in gone), "an older slot gave way"
        ended += [slot.request.request_id for slot in work.slots if slot.finish_reason is not None]
        for slot in slots:
            assert slot.num_output >= outputs.get(slot.request.request_id, 0), "output was lost"
            outputs[slot.request.request_id] = slot.num_output
    assert not scheduler.has_work and ended == [0, 1, 2]
    assert slots[0].num_requeues == 0 and slots[2].num_requeues > 0
    for slot in slots:
        assert slot.output.tolist() == toy.continuation(slot.request.prompt_ids, 6)


def test_a_tree_shrinks_before_anyone_gives_way() -> None:
    toy = ToyTarget(num_pages=4, page_size=2)
    scheduler = Scheduler(2, PagePool(4, 2), 64, ())
    slots = slots_of([0, 0], [1, 1], length=4)
    for slot in slots:
        scheduler.submit(slot)
    drive(scheduler, toy)
    tree = TokenTree.of(list(range(9)), list(range(-1, 8)), "context")
    work = scheduler.plan([slot.number for slot in slots], Forest.of([tree] * 2))
    assert numbers(work) == [0, 1]
    assert [len(own) for own in work.trees] == work.runs.num_nodes.tolist() == [1, 1]
    assert all(slot.num_requeues == 0 for slot in slots)


def test_room_promised_to_a_prompt_is_not_given_to_a_newcomer() -> None:
    """Pages that one slot holds for a tree are no use to another that is still in prefill."""
    toy = ToyTarget(num_pages=13, page_size=1)
    scheduler = Scheduler(3, PagePool(13, 1), 1, ())
    drafting, filling, newcomer = slots_of([1], [2] * 6, [3], length=3)
    scheduler.submit(drafting)
    drive(scheduler, toy)
    scheduler.submit(filling)
    drive(scheduler, toy, {drafting.number: TokenTree.of([1, 2, 3, 4], [-1, 0, 1, 2], "context")})
    scheduler.submit(newcomer)
    scheduler.admit()
    assert scheduler.pool.num_idle == 6 and filling.length + 1 - len(filling.pages.pages) == 6
    assert newcomer.number < 0


def test_a_common_prefix_is_computed_once_and_waited_for() -> None:
    """Sixteen prompts with 500 common tokens: the first computes them while the others wait."""
    toy = ToyTarget(num_pages=100, page_size=16)
    common = np.random.default_rng(0).integers(0, 5, 500).tolist()
    requests = [request(i, [*common, i % 5, i // 5, 1], 4) for i in range(16)]
    engine = engine_of(toy, (), 16, 64, 0, 600)
    finished = run_all(engine, requests, 200)
    assert_plain(toy, requests, finished, 600)
    ends = 503 % 16 + 4
    assert toy.num_computed <= 500 + 16 * (ends + 16)


def test_samples_of_one_prompt_compute_it_once() -> None:
    toy = ToyTarget(num_pages=100, page_size=16)
    prompt = np.random.default_rng(1).integers(0, 5, 320).tolist()
    requests = [request(i, prompt, 1) for i in range(8)]
    assert_plain(toy, requests, run_all(engine_of(toy, (), 8, 512, 0, 600), requests, 50), 600)
    assert toy.num_computed <= 320 + 7 * 16


def test_samples_of_one_prompt_compute_it_once_after_another_that_begins_alike() -> None:
    """What can be copied from the older prompt must not keep the samples from sharing the page of the first of them."""
    toy = ToyTarget(num_pages=100, page_size=16)
    engine = engine_of(toy, (), 9, 512, 0, 600)
    run_all(engine, [request(0, [1, 2, 3, 4] * 3 + [0] * 10, 1)], 10)
    computed = toy.num_computed
    requests = [request(i, [1, 2, 3, 4] * 3 + [2] * 5, 1) for i in range(8)]
    assert_plain(toy, requests, run_all(engine, requests, 50), 600)
    assert toy.num_computed - computed == 4 + 1 + 7


def test_a_prefix_is_waited_for_when_chunks_are_smaller_than_pages() -> None:
    toy = ToyTarget(num_pages=40, page_size=16)
    requests = [request(i, [1] * 64 + [i], 2) for i in range(4)]
    assert_plain(toy, requests, run_all(engine_of(toy, (), 4, 5, 0, 100), requests, 200), 100)
    assert toy.num_computed <= 64 + 4 * (1 + 1 + 16)


def test_one_long_request_holds_no_other_up() -> None:
    toy = ToyTarget(num_pages=50, page_size=4)
    requests = [request(0, [1, 2], 60), *(request(i, [3, i % 5], 3) for i in range(1, 9))]
    finished = run_all(engine_of(toy, (), 2, 64, 0, 100), requests, 200)
    assert [generation.request_id for generation in finished] == [*range(1, 9), 0]


def test_long_prefill_and_decoding_share_rounds() -> None:
    """A long prompt comes in chunks beside slots that decode every round."""
    toy = ToyTarget(num_pages=60, page_size=4)
    scheduler = Scheduler(2, PagePool(60, 4), 8, ())
    slots = slots_of([1], [2] * 100, length=20)
    for slot in slots:
        scheduler.submit(slot)
    for i in range(1, 13):
        assert numbers(drive(scheduler, toy)) == [0, 1]
        assert slots[0].num_output == i
    assert toy.longest_prefill == 8


def test_a_freed_slot_is_taken_in_the_next_round() -> None:
    toy = ToyTarget(num_pages=20, page_size=4)
    scheduler = Scheduler(1, PagePool(20, 4), 64, ())
    for slot in slots_of([1, 1], [2, 2], [3, 3], length=1):
        scheduler.submit(slot)
    assert [numbers(drive(scheduler, toy)) for _ in range(3)] == [[0], [1], [2]]
    assert not scheduler.has_work


@pytest.mark.parametrize(
    ("prompt", "error_type"), [([], "empty_prompt"), ([1] * 40, "prompt_too_long"), ([1] * 50, "prompt_too_long")]
)
def test_hopeless_prompts_are_refused_and_the_engine_goes_on(prompt: list[int], error_type: str) -> None:
    toy = ToyTarget(num_pages=10, page_size=4)
    engine = engine_of(toy, (), 2, 64, 0, 40)
    with pytest.raises(RowError) as caught:
        engine.submit(request(7, prompt, 3))
    assert caught.value.error_type == error_type
    requests = [request(0, [1] * 39, 5)]
    assert_plain(toy, requests, run_all(engine, requests, 50), 40)


@pytest.mark.parametrize("bad", [-1, 5, 1 << 20])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    engine = engine_of(ToyTarget(num_pages=10, page_size=4, vocabulary=5), (), 2, 64, 0, 40)
    with pytest.raises(RowError):
        engine.submit(request(0, [1, bad, 2], 3))
    assert not engine.has_work


def test_plain_decoding_is_a_round_without_trees() -> None:
    toy = ToyTarget(num_pages=10, page_size=4)
    [generation] = run_all(engine_of(toy, (), 1, 64, 8, 40), [request(0, [1, 2, 3], 6)], 50)
    assert (generation.rounds, generation.rounds_without_draft, generation.drafted) == (5, 5, 0)
    assert len(EMPTY_TREE) == 0
