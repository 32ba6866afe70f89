"""Rounds of a model with random weights that say what another model said: its time, the other's acceptance.

Every pass of the target and of its draft head is computed and waited for; then choices and candidates are replaced by
a recording's. So tokens a second are those that a trained pair of this shape, as predictable as the recorded one, would
have. Corpus lookups are a searcher's, on a GPU replayed; the context is searched for real.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.recorded_lookups import RecordedLookups
from pipeline.acceptance import AcceptanceTable
from pipeline.assemble import PAGE_SIZE, measure_step_times
from pipeline.budget import StepTimes
from pipeline.draft_forest import GrowingForest
from pipeline.economy import Economy
from pipeline.engine import Engine, EngineConfig
from pipeline.head import HeadConfig
from pipeline.head_drafter import HeadDrafter
from pipeline.head_files import new_head
from pipeline.head_pass import Outputs
from pipeline.methods import build, method_named
from pipeline.proposal import SlotView
from pipeline.replay import NoText, Recording, candidates, choices_along
from pipeline.request import Request
from pipeline.sampling import Choices
from pipeline.scheduler import Work
from pipeline.search import Searcher
from pipeline.target import Forward, Target

RECORDING, LOOKUPS = "recording.npz", "lookups.npz"
_DRAFT_VOCABULARY = 32768
_RANK = 16
_MARGIN_PAGES = 4  # a slot's tree, beyond its known tokens


def read(directory: Path) -> tuple[Recording, RecordedLookups]:
    """What `benchmarks.gpu_recording` wrote; raises InputError, OSError."""
    return Recording.load(directory / RECORDING), RecordedLookups.load(directory / LOOKUPS)


class PlayedEngine(Engine):
    """An engine whose passes are real and whose tokens are a recording's; request ids count through it in circles."""

    recording: Recording

    def _verify(self, work: Work) -> tuple[Forward, Choices]:
        forward, choices = super()._verify(work)
        return forward, chosen(self.recording, work, forward, choices)


class _PlayedHead(HeadDrafter):
    recording: Recording

    def _level(self, views: Sequence[SlotView], forest: GrowingForest, places: Any) -> Outputs:
        logits, top = super()._level(views, forest, places)
        said: Any = _Said(top, lambda: likeliest(self.recording, views, forest))
        return logits, said


@dataclass(frozen=True)
class _Said:
    """A level's likeliest tokens, which become the recording's when they are waited for."""

    computed: torch.Tensor
    recorded: Callable[[], torch.Tensor]

    def cpu(self) -> torch.Tensor:
        self.computed.cpu()
        return self.recorded()


def chosen(recording: Recording, work: Work, forward: Forward, choices: Choices) -> Choices:
    """What a recording's target said, in place of a pass's choices, [M] int64."""
    token_ids = np.array(choices.token_ids)
    for slot, tree, begin in zip(work.slots, work.trees, forward.begin.tolist(), strict=True):
        if begin >= 0:
            output = recording.outputs[slot.request.request_id % len(recording.outputs)]
            said = choices_along(tree, output[slot.num_output :])
            token_ids[begin : begin + len(said)] = said
    return Choices(token_ids, None)


def likeliest(recording: Recording, views: Sequence[SlotView], forest: GrowingForest) -> torch.Tensor:
    """What a recording's draft model said of a frontier, [F, 2, k] int32, see `pipeline.growth.top_of`."""
    logprobs, tokens = candidates(recording, views, forest)
    bits = logprobs.astype(np.float32).view(np.int32)
    return torch.from_numpy(np.stack([bits, tokens.astype(np.int32)], axis=1))


def played_engine(
    model: PreTrainedModel,
    recording: Recording,
    method_name: str,
    num_slots: int,
    searcher: Searcher,
    *,
    budget: int | None = None,
    is_static: bool | None = None,
    times: StepTimes | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> PlayedEngine:
    """An engine over a model of any shape whose vocabulary holds the recording's.

    Args:
        recording: of greedy generations.
        searcher: of corpora; live text is not searched.
        budget: see `pipeline.engine.EngineConfig`.
        is_static: see `pipeline.target.Target`.
        times: of the target's passes; measured if not given.
        clock: tells seconds.
    """
    assert recording.params.is_greedy and recording.vocab_size <= model.config.get_text_config().vocab_size
    method = method_named(method_name, {"draft", "corpus"})
    longest = max(len(p) + len(o) for p, o in zip(recording.prompts, recording.outputs, strict=True)) + 1
    num_pages = num_slots * (-(-longest // PAGE_SIZE) + _MARGIN_PAGES)
    target = Target(model, num_pages, PAGE_SIZE, num_slots, is_static=is_static)
    drafter = None
    if "draft" in method.sources:
        shape = HeadConfig.for_target(model, "random", _DRAFT_VOCABULARY, _RANK)
        head = new_head(model, shape, torch.arange(shape.draft_vocab_size)).to(model.dtype).eval()
        target.read_states(shape.depths)
        drafter = _PlayedHead(
            head, num_pages, PAGE_SIZE, num_slots, recording.options, is_static=is_static, clock=clock
        )
        drafter.recording = recording
    if not method.sources or budget is not None:
        times = None
    elif times is None:
        times = measure_step_times(target, num_slots)
    economy = None if times is None else Economy(times, recording.options.depth)
    acceptance = AcceptanceTable()
    searchers = (searcher,) if "corpus" in method.sources else ()
    proposers = build(method, acceptance, target.config.vocab_size, searchers, drafter, economy)
    config = EngineConfig(num_slots, budget if method.sources else 0, prefill_chunk=512, max_context=longest)
    engine = PlayedEngine(target, NoText(), (), proposers, acceptance, config, times, clock)
    engine.recording = recording
    return engine


def played_requests(recording: Recording, count: int) -> list[Request]:
    """So many of the recording's requests, over and over."""
    once = recording.requests()
    return [replace(once[row % len(once)], request_id=row) for row in range(count)]
