"""Weights in 8 bits: another target, whose own text every method writes."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.assemble import EngineOptions, build_engine
from pipeline.drafts import load_draft
from pipeline.errors import ModelError
from pipeline.methods import method_named
from pipeline.models import load_causal_lm, resolve_model
from pipeline.prompts import encode_prompt
from pipeline.request import Generation, Request, SamplingParams
from tests.models import tiny_model

SUBJECTS = ["the sea", "bread", "a clock", "winter"]


def load(dtype: torch.dtype) -> PreTrainedModel:
    return load_causal_lm(resolve_model("smollm2-135m"), dtype, "cpu", quantization="int8")


def outputs_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: str, slots: int, *, is_static: bool
) -> list[Generation]:
    chosen = method_named(method, ("draft", "context"))
    draft = load_draft(None, model, resolve_model("smollm2-135m")) if "draft" in chosen.sources else None
    options = EngineOptions(num_slots=slots, max_context=256, is_static=is_static)
    engine = build_engine(model, tokenizer, chosen, options, (), draft)
    params = SamplingParams(max_new_tokens=24)
    prompts = [encode_prompt(tokenizer, f"Here is a note about {subject}. It") for subject in SUBJECTS]
    requests = [Request(i, prompt, params, i) for i, prompt in enumerate(prompts)]
    return sorted(engine.generate(requests), key=lambda generation: generation.request_id)


def test_every_method_writes_what_the_quantised_target_alone_does(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    full, tokenizer = smollm2
    model = load(torch.float32)
    linear = model.model.layers[0].mlp.up_proj.weight
    assert linear.qdata.dtype == torch.int8 if hasattr(linear, "qdata") else "Int8" in repr(linear)
    assert model.lm_head.weight.dtype == torch.float32
    plain = outputs_of(model, tokenizer, "plain", 1, is_static=False)
    for is_static in (False, True):
        drafted = outputs_of(model, tokenizer, "rasd", 4, is_static=is_static)
        assert [output.token_ids for output in drafted] == [output.token_ids for output in plain]
        assert sum(output.accepted for output in drafted) > 20
    ids = torch.tensor([encode_prompt(tokenizer, "The capital of France is")])
    own = load(torch.float32)(input_ids=ids).logits
    full.set_attn_implementation("sdpa")
    other = full(input_ids=ids).logits
    assert 0.0 < (own - other).abs().max() < 3.0, "8 bits are not 32, and not far from them"


def test_quantised_weights_are_not_quantised_again(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="quantised already"):
        load_causal_lm(resolve_model(str(tmp_path)), torch.float32, "cpu", quantization="int8")
    with pytest.raises(ModelError, match=r"share full weights only.*--quantization int8"):
        load_causal_lm(resolve_model("smollm2-135m"), torch.float32, "cpu", quantization="int8", num_ranks=3)
