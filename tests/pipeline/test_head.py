"""The draft head: what training unrolls is what drafting does, and no head changes the output."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.reference import generate
from pipeline import head_entries
from pipeline.acceptance import AcceptanceTable
from pipeline.assemble import PAGE_SIZE
from pipeline.engine import Engine, EngineConfig
from pipeline.errors import ModelError
from pipeline.features import FeatureTap
from pipeline.graphs import Graphs
from pipeline.growth import DraftOptions
from pipeline.head import DraftHead, HeadConfig
from pipeline.head_drafter import HeadDrafter
from pipeline.head_files import is_head, load_head, new_head, save_head
from pipeline.methods import Proposers
from pipeline.pace import FullPace
from pipeline.proposal import Retriever, SlotView
from pipeline.request import Generation, Request, SamplingParams
from pipeline.retrieval import Retrieval
from pipeline.rules import Rule
from pipeline.target import Target
from pipeline.training.data import Example
from pipeline.training.teacher import Teacher
from pipeline.training.unrolled import unrolled
from tests.models import VOCABULARY, tiny_model
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

OPTIONS = DraftOptions(depth=4, width=4, branches=4, num_nodes=24)
CHAIN = DraftOptions(depth=4, width=1, branches=1)


def head_for(architecture: str, seed: int = 0, draft_vocab: int = 96) -> DraftHead:
    """A head of random weights, far from its careful beginning."""
    model = tiny_model(architecture)
    config = HeadConfig.for_target(model, "target", draft_vocab, 4)
    torch.manual_seed(seed)
    head = new_head(model, config, torch.sort(torch.randperm(VOCABULARY)[:draft_vocab]).values)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head.requires_grad_(False)


def engine_with(
    architecture: str,
    head: DraftHead,
    slots: int,
    options: DraftOptions,
    num_pages: int = 128,
    retrievers: tuple[Retriever, ...] = (),
    rule: Rule | None = None,
    is_static: bool | None = None,
) -> Engine:
    target = Target(tiny_model(architecture), num_pages, PAGE_SIZE)
    target.read_states(head.config.depths)
    drafter = HeadDrafter(head, num_pages, PAGE_SIZE, slots, options, is_static=is_static)
    config = EngineConfig(num_slots=slots, budget=64, prefill_chunk=16, max_context=512)
    proposers = Proposers(drafter, retrievers, rule or Rule())
    return Engine(target, NoText(), [2], proposers, AcceptanceTable(), config)


def outputs(engine: Engine, requests: list[Request]) -> list[Generation]:
    return sorted(engine.generate(requests), key=lambda generation: generation.request_id)


@pytest.mark.parametrize("slots", [1, 4, 16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_greedy_output_equals_generate(architecture: str, slots: int) -> None:
    prompts = prompts_for(3, 8)
    model = tiny_model(architecture)
    expected = [generate(model, prompt, NEW_TOKENS) for prompt in prompts]
    requests = requests_for(prompts, GREEDY)
    got = outputs(engine_with(architecture, head_for(architecture), slots, OPTIONS), requests)
    assert_equal(architecture, requests, expected, got)
    assert sum(generation.drafted for generation in got) > 0


@pytest.mark.parametrize("slots", [1, 4])
def test_sampled_output_is_that_of_plain_decoding(slots: int) -> None:
    requests = requests_for(prompts_for(4, 8), SAMPLED)
    plain = [list(g.token_ids) for g in run("llama", requests, proposers_of("plain", {}), slots=1)]
    got = outputs(engine_with("llama", head_for("llama"), slots, OPTIONS), requests)
    assert_equal("llama", requests, plain, got)


@pytest.mark.parametrize("num_common", [0, 70])
def test_running_out_of_pages_and_shared_prefixes_change_nothing(num_common: int) -> None:
    common = tuple(np.random.default_rng(9).integers(3, VOCABULARY, num_common).tolist())
    prompts = [(*common, *prompt) for prompt in prompts_for(6, 8)]
    model = tiny_model("llama")
    expected = [generate(model, prompt, NEW_TOKENS) for prompt in prompts]
    requests = requests_for(prompts, GREEDY)
    num_pages = 6 if num_common else 4
    got = outputs(engine_with("llama", head_for("llama"), 6, OPTIONS, num_pages=num_pages), requests)
    assert_equal("llama", requests, expected, got)
    assert num_common or any(generation.num_requeues for generation in got)


class Seldom(Rule):
    """Drafts in every fifth round only."""

    def __init__(self) -> None:
        self._round = 0

    def pace(self, views: Sequence[SlotView], retrieval: Retrieval) -> FullPace:
        self._round += 1
        return FullPace(wanted=frozenset(range(len(views))) if self._round % 5 == 0 else frozenset())


@pytest.mark.parametrize("num_pages", [5, 128])
def test_entries_that_wait_are_those_written_at_once(num_pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    common = tuple(np.random.default_rng(9).integers(3, VOCABULARY, 70).tolist())
    requests = requests_for([(*common[: 35 * (i % 3)], *prompt) for i, prompt in enumerate(prompts_for(6, 9))], GREEDY)
    runs = []
    # The last as on a GPU, where a capture runs a pass before it is replayed.
    for most_waiting, is_static, times in ((1, False, 1), (10**6, False, 1), (10**6, True, 1), (10**6, True, 3)):

        def several_times(graphs: Any, size: Any, times: int = times) -> Any:
            return [graphs._function(size) for _ in range(times)][-1]

        monkeypatch.setattr(Graphs, "__call__", several_times)
        monkeypatch.setattr(head_entries, "_MOST_WAITING", most_waiting)
        engine = engine_with(
            "llama", head_for("llama"), 4, OPTIONS, num_pages=num_pages, rule=Seldom(), is_static=is_static
        )
        trees: list[list[int]] = []
        engine.drafter.observer = lambda _, tokens, *__, trees=trees: trees.append(tokens.tolist())
        done = outputs(engine, requests)
        runs.append((trees, [(generation.drafted, generation.accepted) for generation in done]))
    assert sum(map(bool, runs[0][0])) > 20
    assert num_pages > 5 or any(generation.num_requeues for generation in done)
    assert runs[1:] == runs[:1] * 3


class Recorder:
    """A head that remembers its layer's outputs."""

    def __init__(self, head: DraftHead) -> None:
        self._head = head
        self.seen: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._head, name)

    def close(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        self.seen.append(self._head.close(residual, attended))
        return self.seen[-1]


def unrolled_choices(head: DraftHead, tokens: list[int], num_prompt: int, steps: int) -> list[int]:
    """The chain that training's unrolled steps draft from the end of `tokens`, by rerunning them with each choice."""
    chain: list[int] = []
    for step in range(steps):
        known = [*tokens, *chain]
        example = Example(np.array(known, np.int32), num_prompt)
        teacher = Teacher(tiny_model("llama"), head, 512)
        batch = teacher.batch([example])
        recorder = Recorder(head)
        unrolled(recorder, batch, step + 1)  # type: ignore[arg-type]
        chain.append(int(head.token_ids[head.logits(recorder.seen[-1][0, -1]).argmax()]))
    return chain


def test_drafting_does_what_training_unrolls() -> None:
    """Cache, pages, positions and masks of the drafter against the attention of the training loss, step by step."""
    prompt = prompts_for(11, 1)[0] * 3
    head = head_for("llama")
    engine = engine_with("llama", head, 1, CHAIN)
    engine.submit(Request(0, prompt, SamplingParams(max_new_tokens=20)))
    checked = 0
    seen: list[tuple[list[int], list[int]]] = []
    drafter = engine.drafter
    original = drafter.draft

    def recording(views, pace):  # type: ignore[no-untyped-def]
        draft = original(views, pace)
        seen.extend((view.tokens.tolist(), tree.tokens.tolist()) for view, tree in zip(views, draft.trees, strict=True))
        return draft

    drafter.draft = recording  # type: ignore[method-assign]
    while engine.has_work:
        engine.step()
    for tokens, drafted in seen:
        for num_prompt in (1, len(prompt)):
            assert drafted == unrolled_choices(head, tokens, num_prompt, len(drafted))
        checked += len(drafted)
    assert checked > 40


def test_the_root_distribution_is_uniform_where_the_head_saw_nothing() -> None:
    head = head_for("llama", draft_vocab=96)
    engine = engine_with("llama", head, 2, CHAIN)
    engine.submit(Request(0, prompts_for(11, 1)[0], SamplingParams(max_new_tokens=8)))
    drafter, seen = engine.drafter, []
    original = drafter.draft

    def with_an_unknown_slot(views, pace):  # type: ignore[no-untyped-def]
        if views:
            unknown = views[0]._replace(slot=1)
            seen.append(original([*views, unknown], FullPace(reads_root=True)))
        return original(views, pace)

    drafter.draft = with_an_unknown_slot  # type: ignore[method-assign]
    while engine.has_work:
        engine.step()
    known, unknown = seen[0].root_logprobs.exp()
    assert len(seen[0].trees[1]) == 0 and unknown.tolist() == pytest.approx([1 / VOCABULARY] * VOCABULARY)
    assert known.sum().item() == pytest.approx(1.0) and int((known > 0).sum()) <= 96


def test_states_are_those_of_the_layers() -> None:
    model = tiny_model("qwen3")
    tap = FeatureTap(model, (0, 2, 3))
    output = model(input_ids=torch.tensor([[3, 4, 5]]), output_hidden_states=True)
    states = tap.take()
    assert torch.equal(states[..., :32], output.hidden_states[1])
    assert torch.equal(states[..., 32:64], output.hidden_states[3])
    tap.close()
    with pytest.raises(ModelError, match="reads layer 9, but the target has 4"):
        FeatureTap(model, (0, 9))


def test_a_head_on_disk_is_the_same_head_and_belongs_to_its_target(tmp_path: Path) -> None:
    model, head = tiny_model("llama"), head_for("llama")
    save_head(head, tmp_path / "head")
    assert is_head(str(tmp_path / "head")) and not is_head(str(tmp_path))
    again = load_head(tmp_path / "head", model, "target")
    for name, value in head.state_dict().items():
        stored = value.bfloat16().to(value.dtype) if value.is_floating_point() else value
        assert torch.equal(again.state_dict()[name], stored)
    with pytest.raises(ModelError, match="trained for the target target, this one is another"):
        load_head(tmp_path / "head", model, "another")
    (tmp_path / "head" / "head.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="is damaged"):
        load_head(tmp_path / "head", model, "target")


def test_the_untrained_head_stays_within_its_size() -> None:
    config = dataclasses.replace(head_for("llama").config, rank=0)
    head = new_head(tiny_model("llama"), config, torch.arange(96))
    assert head.narrow is None
    assert head.logits(torch.zeros(2, 32)).shape == (2, 96)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi"])
def test_a_head_starts_from_the_scale_of_its_targets_last_norm(architecture: str) -> None:
    model = tiny_model(architecture)
    config = HeadConfig.for_target(model, "target", VOCABULARY, 0)
    states = torch.randn(5, config.hidden_size)
    states -= states.mean(dim=-1, keepdim=True)  # where a LayerNorm and an RMSNorm are alike
    norm = getattr(model.get_decoder(), "norm", None) or model.get_decoder().final_layernorm
    with torch.no_grad():
        expected = norm(states) - norm(torch.zeros_like(states))
        got = new_head(model, config, torch.arange(VOCABULARY)).output_norm(states)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
