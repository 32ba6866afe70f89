"""Makes recordings for `pipeline.replay`: plain decoding by the target while the draft model drafts in full at every
place."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.assemble import ALWAYS_TIMED, TIMED_ROWS, EngineOptions, build_engine, measure_step_times
from pipeline.budget import StepTimes
from pipeline.economy import LevelTimes
from pipeline.head import DraftHead
from pipeline.methods import METHODS
from pipeline.pace import FullPace, Pace
from pipeline.proposal import SlotView
from pipeline.replay import Costs, RecordedTree, Recording, draft_key
from pipeline.request import Request, SamplingParams
from pipeline.retrieval import Retrieval
from pipeline.rules import Rule

_SOME_ROWS = np.array([1, 64])


class _TimedPace(FullPace):
    def __init__(self, times: LevelTimes) -> None:
        super().__init__()
        self._times = times

    def took(self, num_rows: int, seconds: float) -> None:
        self._times.observe(num_rows, seconds)


class _TimedRule(Rule):
    """Drafts in full and keeps time."""

    times: ClassVar[LevelTimes]

    def pace(self, views: Sequence[SlotView], retrieval: Retrieval) -> Pace:
        return _TimedPace(self.times)


def record(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draft: PreTrainedModel | DraftHead,
    prompts: Sequence[tuple[int, ...]],
    params: SamplingParams,
    seeds: Sequence[int],
    options: EngineOptions,
    source: Mapping[str, Any],
) -> Recording:
    """Generates and records.

    Args:
        prompts, seeds: one a request.
        options: its budget does not matter; trees are drafted to `options.drafting`.
        source: what it is made from and with; comes back in the recording.
    """
    options = replace(options, budget=0)
    engine = build_engine(model, tokenizer, replace(METHODS["draft"], rule=_TimedRule), options, draft=draft)
    rows = tuple(count for count in TIMED_ROWS if count <= ALWAYS_TIMED)
    seconds = measure_step_times(engine.target, num_slots=1)(np.array(rows))
    _TimedRule.times = LevelTimes(StepTimes(rows, seconds.tolist()))
    drafts: dict[bytes, RecordedTree] = {}

    def keep(view: SlotView, tokens: np.ndarray, parents: np.ndarray, logprobs: np.ndarray) -> None:
        drafts[draft_key(view.tokens, view.seed)] = RecordedTree(tokens.copy(), parents.copy(), logprobs.copy())

    engine.drafter.observer = keep  # type: ignore[attr-defined]
    requests = [Request(row, prompt, params, seeds[row]) for row, prompt in enumerate(prompts)]
    outputs = {generation.request_id: generation.token_ids for generation in engine.generate(requests)}
    few, many = _TimedRule.times(_SOME_ROWS)
    row_seconds = float((many - few) / (_SOME_ROWS[1] - _SOME_ROWS[0]))
    return Recording(
        source=source,
        prompts=prompts,
        outputs=[outputs[row] for row in range(len(prompts))],
        params=params,
        seeds=seeds,
        drafts=drafts,
        options=options.drafting,
        costs=Costs(rows, tuple(seconds.tolist()), float(few) - row_seconds, row_seconds),
        vocab_size=engine.target.config.vocab_size,
    )
