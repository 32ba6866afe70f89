"""The model drafter: its trees are the draft model's own opinion, and no opinion changes the output."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from benchmarks.reference import generate
from pipeline.assemble import PAGE_SIZE
from pipeline.growth import DraftOptions
from pipeline.methods import Proposers
from pipeline.model_drafter import ModelDrafter
from pipeline.pace import FullPace
from pipeline.proposal import SlotView
from pipeline.request import SamplingParams
from pipeline.target import Target
from tests.models import tiny_model
from tests.pipeline.test_engine_architectures import (
    GREEDY,
    NEW_TOKENS,
    SAMPLED,
    assert_equal,
    prompts_for,
    proposers_of,
    requests_for,
    run,
)
from tests.pipeline.toys import path_of

OPTIONS = DraftOptions(depth=4, width=4, branches=4, num_nodes=24)


def drafter_of(architecture: str, seed: int = 0, num_pages: int = 64, options: DraftOptions = OPTIONS) -> ModelDrafter:
    return ModelDrafter(Target(tiny_model(architecture, seed), num_pages, PAGE_SIZE), options)


def views(*texts: Sequence[int], max_depth: int = 9) -> list[SlotView]:
    return [SlotView(slot, np.array(text, np.int32), max_depth) for slot, text in enumerate(texts)]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3", "phi"])
def test_every_node_has_the_probability_that_the_model_gives_its_path(architecture: str) -> None:
    """Levels computed one by one over a cache, several slots at once, windows crossed: as one plain forward pass."""
    model, drafter = tiny_model(architecture), drafter_of(architecture)
    texts = [list(prompt) for prompt in prompts_for(7, 4)]
    for extra in ([], [5, 6, 7], [9]):  # the slots grow, and the cache is caught up with them
        texts = [[*text, *extra] for text in texts]
        draft = drafter.draft(views(*texts), FullPace(reads_root=True))
        assert draft.root_logprobs is not None
        for text, tree, root in zip(texts, draft.trees, draft.root_logprobs, strict=True):
            assert len(tree) == OPTIONS.num_nodes
            own = torch.log_softmax(model(input_ids=torch.tensor([text])).logits[0, -1], -1)
            torch.testing.assert_close(root, own, atol=2e-4, rtol=1e-3)
            for i in range(len(tree)):
                *before, token = path_of(tree, i)
                logits = model(input_ids=torch.tensor([[*text, *before]])).logits[0, -1]
                expected = torch.softmax(logits, -1)[token].item()
                assert tree.scores[i] == pytest.approx(expected, abs=2e-4, rel=2e-3)


def test_a_slot_that_changes_its_text_is_drafted_anew() -> None:
    drafter = drafter_of("llama")
    drafter.draft(views([3, 4, 5, 6, 7, 8]), FullPace(reads_root=True))
    changed = drafter.draft(views([3, 4, 5, 9, 7]), FullPace(reads_root=True)).trees[0]
    drafter.release(0)
    fresh = drafter.draft(views([3, 4, 5, 9, 7]), FullPace(reads_root=True)).trees[0]
    assert changed.tokens.tolist() == fresh.tokens.tolist()
    assert np.allclose(changed.scores, fresh.scores, atol=1e-5)


CHAIN = DraftOptions(depth=4, width=1, branches=1)


@pytest.mark.parametrize("slots", [1, 4, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_output_equals_generate_with_a_perfect_and_with_a_foreign_draft(slots: int, seed: int) -> None:
    prompts = prompts_for(3, 8)
    model = tiny_model("qwen3")
    expected = [generate(model, prompt, NEW_TOKENS) for prompt in prompts]
    requests = requests_for(prompts, GREEDY)
    options = CHAIN if seed == 0 else OPTIONS
    got = run("qwen3", requests, Proposers(drafter_of("qwen3", seed, options=options), ()), slots=slots, num_pages=128)
    assert_equal("qwen3", requests, expected, got)
    if seed == 0:  # the target drafts for itself: everything is accepted that a round can hold
        for generation in got:
            full_rounds, rest = divmod(len(generation.token_ids) - 1, CHAIN.depth + 1)
            assert generation.rounds == full_rounds + (rest > 0)


@pytest.mark.parametrize("slots", [1, 4, 16])
def test_sampled_output_is_that_of_plain_decoding(slots: int) -> None:
    requests = requests_for(prompts_for(4, 8), SAMPLED)
    plain = [list(g.token_ids) for g in run("llama", requests, proposers_of("plain", {}), slots=1)]
    for seed in (0, 1):
        got = run("llama", requests, Proposers(drafter_of("llama", seed), ()), slots=slots, num_pages=128)
        assert_equal("llama", requests, plain, got)


def test_noise_shared_with_the_target_makes_a_perfect_draft_perfect_when_sampling() -> None:
    requests = requests_for(prompts_for(5, 6), SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0))
    rounds = {}
    for is_coupled in (True, False):
        options = DraftOptions(depth=4, width=1, branches=1, is_coupled=is_coupled)
        got = run("llama", requests, Proposers(drafter_of("llama", options=options), ()))
        rounds[is_coupled] = sum(generation.rounds for generation in got)
        plain = run("llama", requests, proposers_of("plain", {}))
        assert [g.token_ids for g in got] == [g.token_ids for g in plain]
    assert rounds[True] <= 6 * -(-(NEW_TOKENS - 1) // 5) < rounds[False]


def test_without_room_for_a_slot_it_gets_an_empty_tree_and_the_same_output() -> None:
    prompts = prompts_for(6, 6)
    model = tiny_model("llama")
    expected = [generate(model, prompt, NEW_TOKENS) for prompt in prompts]
    requests = requests_for(prompts, GREEDY)
    got = run("llama", requests, Proposers(drafter_of("llama", num_pages=5), ()), slots=4)
    assert_equal("llama", requests, expected, got)
    assert 0 < sum(g.rounds_without_draft for g in got) < sum(g.rounds for g in got)


def test_nothing_is_drafted_beyond_the_depth_of_use() -> None:
    drafter = drafter_of("llama")
    for depth in (0, 1, 2):
        (tree,) = drafter.draft(views([3, 4, 5], max_depth=depth), FullPace(reads_root=True)).trees
        assert max((len(path_of(tree, i)) for i in range(len(tree))), default=0) == depth
    assert list(drafter.draft([], FullPace(reads_root=True)).trees) == []
