"""A replay does, round for round, what the real engine did, for any method and budget, from a file alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.assemble import EngineOptions, build_engine
from pipeline.growth import DraftOptions
from pipeline.methods import METHODS
from pipeline.record import record
from pipeline.replay import Recording, ReplayEngine
from pipeline.request import Generation, Request, SamplingParams
from tests.models import tiny_model
from tests.pipeline.test_engine_architectures import prompts_for
from tests.pipeline.test_head import NoText

GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.8, top_k=12)
OPTIONS = EngineOptions(num_slots=2, max_context=256, drafting=DraftOptions(depth=3, width=4, branches=4, num_nodes=24))
PROMPTS = [tuple(prompt * 3) for prompt in prompts_for(41, 4)]


def recording_of(params: SamplingParams) -> Recording:
    model, draft = tiny_model("llama"), tiny_model("llama")
    return record(model, NoText(), draft, PROMPTS, params, range(-2, len(PROMPTS) - 2), OPTIONS, {"made": "here"})  # type: ignore[arg-type]


def really(name: str, params: SamplingParams, budget: int) -> list[Generation]:
    model, draft = tiny_model("llama"), tiny_model("llama")
    method = replace(METHODS[name], sources=tuple(s for s in METHODS[name].sources if s in ("draft", "context")))
    drafter = draft if "draft" in method.sources else None
    engine = build_engine(model, NoText(), method, replace(OPTIONS, budget=budget), draft=drafter)  # type: ignore[arg-type]
    requests = [Request(row, prompt, params, row - 2) for row, prompt in enumerate(PROMPTS)]
    return sorted(engine.generate(requests), key=lambda generation: generation.request_id)


def replayed(recording: Recording, name: str, budget: int | None) -> tuple[list[Generation], ReplayEngine]:
    method = replace(METHODS[name], sources=tuple(s for s in METHODS[name].sources if s in ("draft", "context")))
    engine = ReplayEngine(recording, method, num_slots=2, budget=budget)
    return sorted(engine.generate(engine.requests()), key=lambda generation: generation.request_id), engine


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_replay_accepts_what_the_engine_accepted(params: SamplingParams, tmp_path: Path) -> None:
    recording_of(params).save(tmp_path / "recording.npz")
    recording = Recording.load(tmp_path / "recording.npz")
    accepted = 0
    for name in ("plain", "context", "draft", "switch", "rasd"):
        for expected, got in zip(really(name, params, 6), replayed(recording, name, 6)[0], strict=True):
            assert got.token_ids == expected.token_ids
            assert (got.rounds, got.drafted) == (expected.rounds, expected.drafted), name
            assert got.accepted_by_source == expected.accepted_by_source
            accepted += got.accepted
    assert accepted > 20


def test_a_recording_comes_back_from_its_file(tmp_path: Path) -> None:
    recording = recording_of(SAMPLED)
    recording.save(tmp_path / "recording.npz")
    loaded = Recording.load(tmp_path / "recording.npz")
    for name in ("source", "outputs", "prompts", "params", "options", "costs", "vocab_size"):
        assert getattr(loaded, name) == getattr(recording, name)
    assert list(loaded.seeds) == list(recording.seeds)
    assert len(loaded.drafts) == sum(len(output) - 2 for output in recording.outputs)  # with room for a draft
    for key, tree in loaded.drafts.items():
        np.testing.assert_array_equal(tree.tokens, recording.drafts[key].tokens)
        np.testing.assert_array_equal(tree.parents, recording.drafts[key].parents)
        np.testing.assert_allclose(tree.logprobs, recording.drafts[key].logprobs, atol=2e-2)


def test_the_clock_passes_by_measured_times_alone() -> None:
    recording = recording_of(GREEDY)
    plain = replayed(recording, "plain", None)[1].clock.now
    assert replayed(recording, "plain", None)[1].clock.now == plain > 0
    drafting = replayed(recording, "draft", 6)[1]
    assert drafting.clock.now != plain
    costly = replace(recording, costs=replace(recording.costs, level_fixed=10.0))
    assert replayed(costly, "draft", 6)[1].clock.now > drafting.clock.now
    tuned = replayed(costly, "rasd", None)[0]
    assert sum(generation.rounds_without_draft for generation in tuned) > 0, "levels of ten seconds do not pay"
