"""The real embedded model on real prompts: our text is transformers' own, with every method and number of slots.

A short form of `benchmarks.exactness`, which does the same for 64 prompts of all tasks.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.reference import first_mismatch, generate
from pipeline.assemble import EngineOptions, build_engine
from pipeline.methods import method_named
from pipeline.models import load_causal_lm, resolve_model
from pipeline.noise import row_seed
from pipeline.prompts import encode_messages
from pipeline.request import Generation, Request, SamplingParams

NEW_TOKENS = 20
EXAMPLES = Path(__file__).parents[2] / "examples" / "prompts.jsonl"
GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS)
SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.9)

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def prompts(smollm2: Loaded) -> list[tuple[int, ...]]:
    rows = [json.loads(line) for line in EXAMPLES.read_text().splitlines()]
    return [encode_messages(smollm2[1], row["messages"]) for row in rows[::5]]


@pytest.fixture(scope="module")
def expected(smollm2: Loaded, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    return [generate(smollm2[0], prompt, NEW_TOKENS) for prompt in prompts]


def run(
    loaded: Loaded, prompts: list[tuple[int, ...]], params: SamplingParams, method: str, slots: int
) -> list[Generation]:
    model = load_causal_lm(resolve_model("smollm2-135m"), loaded[0].dtype, "cpu")
    engine = build_engine(model, loaded[1], method_named(method), EngineOptions(num_slots=slots, max_context=2048))
    order = range(len(prompts)) if slots == 1 else reversed(range(len(prompts)))
    requests = [Request(i, prompts[i], params, row_seed(0, i, 0)) for i in order]
    return sorted(engine.generate(requests), key=lambda generation: generation.request_id)


@pytest.mark.parametrize(("method", "slots"), [("plain", 1), ("plain", 4), ("context", 1), ("context", 16)])
def test_greedy_output_equals_generate(
    smollm2: Loaded, prompts: list[tuple[int, ...]], expected: list[list[int]], method: str, slots: int
) -> None:
    generations = run(smollm2, prompts, GREEDY, method, slots)
    for prompt, want, generation in zip(prompts, expected, generations, strict=True):
        mismatch = first_mismatch(smollm2[0], prompt, want, generation.token_ids)
        assert mismatch is None or not mismatch.counts, mismatch
        assert generation.text == smollm2[1].decode(generation.token_ids, skip_special_tokens=True)
    if method == "context":
        assert sum(generation.accepted for generation in generations) > 0


def test_sampled_output_is_the_same_with_speculation_on_and_off(
    smollm2: Loaded, prompts: list[tuple[int, ...]]
) -> None:
    plain = run(smollm2, prompts, SAMPLED, "plain", 1)
    drafted = run(smollm2, prompts, SAMPLED, "context", 4)
    for i, (prompt, a, b) in enumerate(zip(prompts, plain, drafted, strict=True)):
        mismatch = first_mismatch(smollm2[0], prompt, a.token_ids, b.token_ids, SAMPLED, row_seed(0, i, 0))
        assert mismatch is None or not mismatch.counts, mismatch


def test_a_stop_string_ends_the_output_and_is_cut_off(
    smollm2: Loaded, prompts: list[tuple[int, ...]], expected: list[list[int]]
) -> None:
    text = smollm2[1].decode(expected[0], skip_special_tokens=True)
    assert isinstance(text, str)
    stop = text[20:26]
    (generation,) = run(smollm2, prompts[:1], replace(GREEDY, stop=(stop,)), "context", 1)
    assert generation.finish_reason == "stop"
    assert generation.text == text[: text.index(stop)]
    assert stop not in smollm2[1].decode(generation.token_ids[:-1], skip_special_tokens=True)


def test_a_common_prefix_is_prefilled_once(smollm2: Loaded, prompts: list[tuple[int, ...]]) -> None:
    prefix = max(prompts, key=len)[:200]
    requests = [Request(i, (*prefix, 100 + i, 200 + i), replace(GREEDY, max_new_tokens=1)) for i in range(24)]
    model = load_causal_lm(resolve_model("smollm2-135m"), smollm2[0].dtype, "cpu")
    rows: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    engine = build_engine(model, smollm2[1], method_named("plain"), EngineOptions(num_slots=8, max_context=512))
    rows.clear()
    generations = list(engine.generate(requests))
    hook.remove()
    assert len(generations) == 24
    assert sum(rows) == 202 + 23 * 2
