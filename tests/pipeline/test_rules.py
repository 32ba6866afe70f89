"""Rules: the paper's pruning and SAM-Decoding's switch against plain loops over the same trees, and both lossless."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.reference import generate
from pipeline import graphs
from pipeline.acceptance import AcceptanceTable
from pipeline.assemble import PAGE_SIZE
from pipeline.budget import StepTimes
from pipeline.context import ContextRetriever
from pipeline.draft_forest import GrowingForest
from pipeline.economy import Economy
from pipeline.engine import Engine, EngineConfig
from pipeline.forest import Forest
from pipeline.growth import DraftOptions
from pipeline.head_drafter import HeadDrafter
from pipeline.methods import METHODS, Proposers
from pipeline.model_drafter import ModelDrafter
from pipeline.proposal import Draft, Drafter, NullDrafter, SlotView
from pipeline.request import Request, SamplingParams
from pipeline.retrieval import Retrieval
from pipeline.rules import Calibrated, FixedPruning, Switch, chain_of
from pipeline.target import Target
from pipeline.tree import EMPTY_TREE, TokenTree
from pipeline.verify import Outcome
from tests.models import OracleDrafter, tiny_model
from tests.pipeline.test_budget import all_paths
from tests.pipeline.test_engine_architectures import (
    GREEDY,
    NEW_TOKENS,
    SAMPLED,
    NoText,
    assert_equal,
    prompts_for,
    proposers_of,
    requests_for,
    run,
)
from tests.pipeline.test_head import head_for
from tests.pipeline.toys import trees

VOCABULARY = 40
random_trees = trees(max_nodes=20, vocabulary=VOCABULARY)


@settings(deadline=None)
@given(random_trees, random_trees, st.integers(0, 1 << 30))
def test_the_draft_distribution_prunes_what_was_retrieved(drafted: TokenTree, retrieved: TokenTree, seed: int) -> None:
    rule = FixedPruning(rank=5, probability=0.06)
    logprobs = (3 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)
    views = [SlotView(0, np.array([1], np.int32), 9)]
    (got,) = rule.join(views, Draft([drafted], logprobs), Forest.of([retrieved]))
    likely = logprobs[0].argsort(descending=True)[:5].tolist()
    stays = {token for token in range(VOCABULARY) if token in likely or float(logprobs[0, token].exp()) >= 0.06}
    assert all_paths(got) == all_paths(drafted) | {path for path in all_paths(retrieved) if path[0] in stays}
    (unpruned,) = rule.join(views, Draft([drafted]), Forest.of([retrieved]))
    assert all_paths(unpruned) == all_paths(drafted) | all_paths(retrieved)


@settings(deadline=None)
@given(random_trees, random_trees)
def test_a_long_match_switches_to_its_chain(drafted: TokenTree, retrieved: TokenTree) -> None:
    rule = Switch(match=5)
    tops = [i for i in range(len(retrieved)) if retrieved.parents[i] < 0]
    is_long = any(int(retrieved.matches[i].max()) >= 5 for i in tops)
    views = [SlotView(0, np.array([1], np.int32), 9)]
    retrieval = Retrieval((), views)
    retrieval.trees = [retrieved]
    pace = rule.pace(views, retrieval)
    assert pace.expand(0, GrowingForest([2], 4, 2)).tolist() == [not is_long]
    (got,) = rule.join(views, Draft([EMPTY_TREE if is_long else drafted]), Forest.of([retrieved]))
    assert all_paths(got) == (all_paths(chain_of(retrieved)) if is_long else all_paths(drafted))


@settings(deadline=None)
@given(random_trees)
def test_a_chain_takes_the_likeliest_child(tree: TokenTree) -> None:
    expected, node = [], -1
    while children := [i for i in range(len(tree)) if tree.parents[i] == node]:
        node = max(children, key=lambda i: (tree.scores[i], -i))
        expected.append(int(tree.tokens[node]))
    chain = chain_of(tree)
    assert chain.tokens.tolist() == expected
    assert chain.parents.tolist() == list(range(-1, len(expected) - 1))


def expected_outputs(requests: list[Request]) -> list[list[int]]:
    """Plain decoding's own: transformers' if greedy, else one slot without drafts."""
    if requests[0].params.is_greedy:
        return [generate(tiny_model("llama"), request.prompt_ids, NEW_TOKENS) for request in requests]
    return [list(g.token_ids) for g in run("llama", requests, proposers_of("plain", {}), slots=1)]


def engine_of(
    name: str,
    drafter: str,
    slots: int,
    budget: int | None,
    outputs: dict[tuple[int, ...], list[int]],
    num_pages: int = 256,
) -> Engine:
    """An engine with a context retriever, the method's rule, and a head, a model, random trees or nothing to draft."""
    options = DraftOptions(depth=3, width=4, branches=4, num_nodes=24)
    target = Target(tiny_model("llama"), num_pages, PAGE_SIZE)
    times = StepTimes((1, 64), (0.01, 0.02)) if budget is None else None
    economy = None if times is None else Economy(times, options.depth)
    drafters: dict[str, Callable[[], Drafter]] = {
        "head": lambda: HeadDrafter(head_for("llama"), num_pages, PAGE_SIZE, slots, options),
        "model": lambda: ModelDrafter(Target(tiny_model("llama", 1), 256, PAGE_SIZE), options),
        "random": lambda: OracleDrafter(outputs),
        "none": NullDrafter,
    }
    if drafter == "head":
        target.read_states(head_for("llama").config.depths)
    context = ContextRetriever(AcceptanceTable())
    proposers = Proposers(drafters[drafter](), (context,), METHODS[name].rule.for_engine(economy))
    config = EngineConfig(num_slots=slots, budget=budget, prefill_chunk=16, max_context=512)
    return Engine(target, NoText(), [2], proposers, AcceptanceTable(), config, times)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("slots", [1, 4, 16])
@pytest.mark.parametrize("drafter", ["head", "model", "random", "none"])
@pytest.mark.parametrize(("name", "budget"), [("switch", 24), ("rasd-fixed", 24), ("rasd", 24), ("rasd", None)])
def test_no_rule_changes_the_output(
    name: str, budget: int | None, drafter: str, slots: int, params: SamplingParams
) -> None:
    prompts = [prompt * 3 for prompt in prompts_for(31, 16 if slots == 16 else 6)]  # so that something matches
    requests = requests_for(prompts, params)
    expected = expected_outputs(requests)
    known = dict(zip(prompts, expected, strict=True))
    got = sorted(engine_of(name, drafter, slots, budget, known).generate(requests), key=lambda g: g.request_id)
    assert_equal("llama", requests, expected, got)
    if (name, drafter) != ("switch", "none"):  # which needs a match of five tokens
        assert sum(generation.drafted for generation in got) > 0


def test_slots_that_give_way_are_drafted_for_again_and_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that computes its tokens again has a round that was none of the drafting's."""
    gains: list[float] = []
    observe_gains = Economy.observe_gains

    def spy(economy: Economy, expected: np.ndarray, gained: np.ndarray) -> None:
        gains.extend(gained.tolist())
        observe_gains(economy, expected, gained)

    monkeypatch.setattr(Economy, "observe_gains", spy)
    prompts = prompts_for(6, 12)
    requests = requests_for(prompts, GREEDY)
    model = tiny_model("llama")
    expected = [generate(model, prompt, NEW_TOKENS) for prompt in prompts]
    done = sorted(engine_of("rasd", "head", 6, None, {}, num_pages=3).generate(requests), key=lambda g: g.request_id)
    assert_equal("llama", requests, expected, done)
    assert any(generation.num_requeues for generation in done)
    assert gains


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("drafter", ["head", "model", "none"])
@pytest.mark.parametrize(("name", "budget"), [("rasd-fixed", 24), ("rasd", None)])
def test_passes_of_fixed_sizes_change_nothing(
    name: str, budget: int | None, drafter: str, slots: int, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a GPU, uncaptured."""
    monkeypatch.setattr(graphs, "pays", lambda device: True)
    test_no_rule_changes_the_output(name, budget, drafter, slots, params)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter", ["head", "model"])
@pytest.mark.parametrize("num_pages", [256, 5])
def test_rounds_of_rest_change_nothing(
    drafter: str, num_pages: int, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever speculation pauses, and while slots give way; afterwards it goes on."""
    draws = np.random.default_rng(3)
    monkeypatch.setattr(Calibrated, "rests", lambda self, num_slots: bool(num_slots and draws.random() < 0.3))
    prompts = [prompt * 3 for prompt in prompts_for(31, 8)]
    requests = requests_for(prompts, params)
    expected = expected_outputs(requests)
    done = sorted(
        engine_of("rasd", drafter, 4, None, {}, num_pages).generate(requests),
        key=lambda generation: generation.request_id,
    )
    assert_equal("llama", requests, expected, done)
    assert sum(generation.drafted for generation in done) > 0


class Late:
    """A retriever that answers when it is waited for."""

    is_ready = False

    def send(self, views: Sequence[SlotView]) -> None:
        """Nothing leaves."""

    def lookup(self, views: Sequence[SlotView]) -> list[TokenTree]:
        return [TokenTree.of([5, 6], [-1, 0], "corpus", [0.9, 0.9])] * len(views)


def test_what_came_behind_the_draft_is_no_gain_of_drafting() -> None:
    economy = Economy(StepTimes((1, 64), (0.01, 0.02)), 3)
    rule = Calibrated(economy)
    views = [SlotView(7, np.array([1, 2], np.int32), 8)]
    for _ in range(50):
        retrieval = Retrieval([Late()], views)  # type: ignore[list-item]
        pace = rule.pace(views, retrieval)
        pace.expand(0, GrowingForest([3], 8, 8))
        (tree,) = rule.join(views, Draft([TokenTree.of([9], [-1], "draft", [0.1])]), retrieval.finish())
        rule.lesson()(Forest.of([tree]), Outcome.of([np.array([5, 6, 1])]))
    assert economy.worth[0] < 0.5, "the draft model found nothing"
