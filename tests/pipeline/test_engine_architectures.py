"""The engine's output equals transformers' `generate` on every supported architecture, whatever the trees."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.reference import first_mismatch, generate
from pipeline.acceptance import AcceptanceTable
from pipeline.assemble import PAGE_SIZE
from pipeline.context import ContextRetriever
from pipeline.engine import Engine, EngineConfig
from pipeline.errors import ModelError
from pipeline.methods import Proposers
from pipeline.proposal import NullDrafter
from pipeline.request import Generation, Request, SamplingParams
from pipeline.target import Target, kv_shape
from tests.models import ARCHITECTURES, VOCABULARY, OracleDrafter, tiny_model

NEW_TOKENS = 24
GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS)
SAMPLED = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.8, top_p=0.9)


class NoText:
    """A decoder for models without a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, token_ids))


def prompts_for(seed: int, count: int = 6) -> list[tuple[int, ...]]:
    random = np.random.default_rng(seed)
    return [tuple(random.integers(3, VOCABULARY, random.integers(1, 40)).tolist()) for _ in range(count)]


def run(
    architecture: str,
    requests: list[Request],
    proposers: Proposers,
    *,
    slots: int = 3,
    num_pages: int = 64,
    prefill_chunk: int = 16,
    budget: int = 64,
) -> list[Generation]:
    engine = Engine(
        Target(tiny_model(architecture), num_pages, PAGE_SIZE),
        NoText(),
        [2],
        proposers,
        AcceptanceTable(),
        EngineConfig(num_slots=slots, budget=budget, prefill_chunk=prefill_chunk, max_context=512),
    )
    return sorted(engine.generate(requests), key=lambda generation: generation.request_id)


def requests_for(prompts: list[tuple[int, ...]], params: SamplingParams) -> list[Request]:
    return [Request(i, prompt, params, seed=1000 + i) for i, prompt in enumerate(prompts)]


def proposers_of(kind: str, outputs: dict[tuple[int, ...], list[int]]) -> Proposers:
    if kind == "plain":
        return Proposers(NullDrafter(), ())
    if kind == "context":
        return Proposers(NullDrafter(), (ContextRetriever(AcceptanceTable()),))
    return Proposers(OracleDrafter(outputs), (ContextRetriever(AcceptanceTable()),))


def assert_equal(architecture: str, requests: list[Request], expected: list[list[int]], got: list[Generation]) -> None:
    model = tiny_model(architecture)
    for request, want, generation in zip(requests, expected, got, strict=True):
        mismatch = first_mismatch(model, request.prompt_ids, want, generation.token_ids, request.params, request.seed)
        assert mismatch is None or not mismatch.counts, (architecture, request.request_id, mismatch)


@pytest.mark.parametrize("kind", ["plain", "context", "oracle"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_output_equals_generate(architecture: str, kind: str) -> None:
    # Windows of 8 and 12 are crossed by prompts of up to 40 tokens, inside trees of depth 8, and after commits.
    prompts = prompts_for(1)
    model = tiny_model(architecture)
    expected = [generate(model, prompt, NEW_TOKENS) for prompt in prompts]
    requests = requests_for(prompts, GREEDY)
    got = run(architecture, requests, proposers_of(kind, dict(zip(prompts, expected, strict=True))))
    assert_equal(architecture, requests, expected, got)
    if kind == "oracle":
        assert sum(generation.accepted for generation in got) > NEW_TOKENS


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3"])
def test_sampled_output_is_the_same_with_any_tree_and_any_number_of_slots(architecture: str) -> None:
    prompts = prompts_for(2)
    requests = requests_for(prompts, SAMPLED)
    plain = [list(g.token_ids) for g in run(architecture, requests, proposers_of("plain", {}), slots=1)]
    drafted = run(architecture, requests, proposers_of("oracle", dict(zip(prompts, plain, strict=True))), slots=4)
    assert_equal(architecture, requests, plain, drafted)
    assert sum(generation.accepted for generation in drafted) > NEW_TOKENS


@pytest.mark.parametrize("kind", ["plain", "oracle"])
def test_repetition_penalty_sees_each_nodes_own_ancestors(kind: str) -> None:
    prompts = prompts_for(3)
    model = tiny_model("llama")
    expected = [generate(model, prompt, NEW_TOKENS, repetition_penalty=1.3) for prompt in prompts]
    requests = requests_for(prompts, replace(GREEDY, repetition_penalty=1.3))
    got = run("llama", requests, proposers_of(kind, dict(zip(prompts, expected, strict=True))))
    assert_equal("llama", requests, expected, got)


@pytest.mark.parametrize("kind", ["plain", "oracle"])
def test_running_out_of_pages_requeues_the_youngest_and_changes_nothing(kind: str) -> None:
    prompts = prompts_for(4, count=10)
    requests = requests_for(prompts, replace(GREEDY, max_new_tokens=100))
    free = run("llama", requests, proposers_of("plain", {}), slots=8)
    expected = [list(generation.token_ids) for generation in free]
    # Eight slots of up to 140 tokens in 8 pages of 32: room for about two of them.
    proposers = proposers_of(kind, dict(zip(prompts, expected, strict=True)))
    tight = run("llama", requests, proposers, slots=8, num_pages=8)
    assert_equal("llama", requests, expected, tight)
    assert sum(generation.num_requeues for generation in tight) > 0


def test_logprobs_are_the_targets_own() -> None:
    prompt = prompts_for(5, count=1)[0]
    request = Request(0, prompt, replace(SAMPLED, logprobs=True), seed=5)
    (generation,) = run("llama", [request], proposers_of("context", {}))
    ids = torch.tensor([[*prompt, *generation.token_ids]])
    with torch.inference_mode():
        table = tiny_model("llama")(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = table.gather(1, ids[0, len(prompt) :, None])[:, 0]
    assert torch.allclose(torch.tensor(generation.logprobs), expected, atol=1e-3)


def test_a_model_whose_layers_are_no_attention_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ModelError, match="mamba"):
        kv_shape(model)
