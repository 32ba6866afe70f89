"""A target spread over devices decodes as one on a single device does.

There is one device here: its layers are told to be on `cpu` and on `cpu:0`, which torch tells apart by name only. So
the pools, the moves and the masks of each device are real, the copies between devices are not.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import target
from pipeline.acceptance import AcceptanceTable
from pipeline.assemble import PAGE_SIZE
from pipeline.context import ContextRetriever
from pipeline.engine import Engine, EngineConfig
from pipeline.kv_cache import KVShape, PagedCache
from pipeline.methods import Proposers
from pipeline.models import load_causal_lm, resolve_model
from pipeline.proposal import NullDrafter
from pipeline.request import Request, SamplingParams
from pipeline.target import Target, kv_shape
from tests.models import VOCABULARY, tiny_model

DEVICES = (torch.device("cpu"), torch.device("cpu", 0), torch.device("cpu"), torch.device("cpu", 0))


def test_pools_of_two_devices_hold_what_one_pool_would() -> None:
    shape = KVShape(4, 2, 8, torch.float32)
    caches = [PagedCache(each, 6, 4, torch.device("cpu")) for each in (shape, replace(shape, devices=DEVICES))]
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([3, 17, 9, 22])
    new = torch.randn((4, 2, 1, 2, 4, 8), generator=generator)  # layers, key or value, [1, K, T, D]
    for cache in caches:
        cache.place(index)
        for layer in range(4):
            cache.update(new[layer, 0], new[layer, 1], layer)
        cache.move(torch.tensor([3, 22]), torch.tensor([22, 1]))
    assert len({layer.data_ptr() for layer in caches[1].keys}) == 4
    for layer in range(4):
        assert torch.equal(caches[0].keys[layer], caches[1].keys[layer])
        assert torch.equal(caches[0].values[layer], caches[1].values[layer])
    assert torch.equal(caches[1].keys[2][22 // 4, :, 22 % 4], new[2, 0, 0, :, 0])


class NoText:
    """A decoder for models without a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, token_ids))


def outputs_of(architecture: str, prompts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], int]:
    """Token ids by prompt, and how many drafted tokens were accepted."""
    tap = Target(tiny_model(architecture), 64, PAGE_SIZE)
    tap.read_states([0, 1, 3])
    engine = Engine(
        tap,
        NoText(),
        [2],
        Proposers(NullDrafter(), [ContextRetriever(AcceptanceTable())]),
        AcceptanceTable(),
        EngineConfig(num_slots=3, budget=16, prefill_chunk=16, max_context=512),
    )
    params = SamplingParams(max_new_tokens=40, repetition_penalty=1.0)
    found = sorted(
        engine.generate([Request(i, prompt, params) for i, prompt in enumerate(prompts)]), key=lambda g: g.request_id
    )
    return [generation.token_ids for generation in found], sum(generation.accepted for generation in found)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_outputs_do_not_depend_on_where_the_layers_are(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    prompts = [tuple(random.integers(3, VOCABULARY, 12).tolist()) * 3 for _ in range(5)]
    whole = outputs_of(architecture, prompts)
    monkeypatch.setattr(target, "kv_shape", lambda model: replace(kv_shape(model), devices=DEVICES))
    assert outputs_of(architecture, prompts) == whole
    assert whole[1] > 0


def test_a_device_map_is_made_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from_pretrained, asked = AutoModelForCausalLM.from_pretrained, []

    def noting(*arguments: Any, **options: Any) -> Any:
        asked.append(options["device_map"])
        return from_pretrained(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noting)
    resolved = resolve_model("smollm2-135m")
    models = [load_causal_lm(resolved, torch.float32, device) for device in ("auto", "cpu")]
    assert asked == ["auto", {"": "cpu"}]
    assert all(kv_shape(model).devices == () for model in models)
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(auto, plain) for auto, plain in pairs)
