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
from pipeline.head import DraftHead
from pipeline.head_files import load_head, read_config, shipped_head
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
    return [encode_messages(smollm2[1], row["messages"]) for row in rows[::7]]


@pytest.fixture(scope="module")
def expected(smollm2: Loaded, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    return [generate(smollm2[0], prompt, NEW_TOKENS) for prompt in prompts]


def run(
    loaded: Loaded, prompts: list[tuple[int, ...]], params: SamplingParams, method: str, slots: int
) -> list[Generation]:
    model = load_causal_lm(resolve_model("smollm2-135m"), loaded[0].dtype, "cpu")
    options = EngineOptions(num_slots=slots, max_context=2048)
    draft = shipped(model) if method in ("draft", "rasd") else None
    engine = build_engine(model, loaded[1], method_named(method), options, draft=draft)
    order = range(len(prompts)) if slots == 1 else reversed(range(len(prompts)))
    requests = [Request(i, prompts[i], params, row_seed(0, i, 0)) for i in order]
    return sorted(engine.generate(requests), key=lambda generation: generation.request_id)


def shipped(model: PreTrainedModel) -> DraftHead:
    target = resolve_model("smollm2-135m").hash
    head = shipped_head(target)
    assert head is not None
    return load_head(head, model, target)


@pytest.mark.parametrize(
    ("method", "slots"),
    [
        ("plain", 1),
        ("plain", 4),
        ("context", 1),
        ("context", 16),
        ("draft", 1),
        ("draft", 4),
        ("draft", 16),
        ("rasd", 1),
        ("rasd", 16),
    ],
)
def test_greedy_output_equals_generate(
    smollm2: Loaded, prompts: list[tuple[int, ...]], expected: list[list[int]], method: str, slots: int
) -> None:
    generations = run(smollm2, prompts, GREEDY, method, slots)
    for prompt, want, generation in zip(prompts, expected, generations, strict=True):
        mismatch = first_mismatch(smollm2[0], prompt, want, generation.token_ids)
        assert mismatch is None or not mismatch.counts, mismatch
        assert generation.text == smollm2[1].decode(generation.token_ids, skip_special_tokens=True)
    if method != "plain":
        assert sum(generation.accepted for generation in generations) > 0


@pytest.fixture(scope="module")
def sampled(smollm2: Loaded, prompts: list[tuple[int, ...]]) -> list[Generation]:
    return run(smollm2, prompts, SAMPLED, "plain", 1)


@pytest.mark.parametrize(("method", "slots"), [("context", 4), ("draft", 1), ("draft", 4), ("draft", 16), ("rasd", 4)])
def test_sampled_output_is_the_same_with_speculation_on_and_off(
    smollm2: Loaded, prompts: list[tuple[int, ...]], sampled: list[Generation], method: str, slots: int
) -> None:
    plain, drafted = sampled, run(smollm2, prompts, SAMPLED, method, slots)
    for i, (prompt, a, b) in enumerate(zip(prompts, plain, drafted, strict=True)):
        mismatch = first_mismatch(smollm2[0], prompt, a.token_ids, b.token_ids, SAMPLED, row_seed(0, i, 0))
        assert mismatch is None or not mismatch.counts, mismatch


def test_the_shipped_head_drafts_well_and_is_small(smollm2: Loaded, prompts: list[tuple[int, ...]]) -> None:
    head = shipped_head(resolve_model("smollm2-135m").hash)
    assert head is not None
    assert sum(path.stat().st_size for path in head.iterdir()) <= 12_000_000
    assert read_config(head).draft_vocab_size >= 8000
    model = load_causal_lm(resolve_model("smollm2-135m"), smollm2[0].dtype, "cpu")
    options = EngineOptions(num_slots=4, max_context=2048, budget=32)
    engine = build_engine(model, smollm2[1], method_named("draft"), options, draft=shipped(model))
    done = list(engine.generate([Request(i, prompt, GREEDY) for i, prompt in enumerate(prompts)]))
    tau = sum(len(g.token_ids) - 1 for g in done) / sum(g.rounds for g in done)
    assert tau > 1.7
    assert shipped_head("0" * 64) is None


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
