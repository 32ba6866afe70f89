"""Recorded generations, and their replay through drafting and selection without the target or the draft model.

The output does not depend on what is proposed, so a recording holds one output and, for every place of it, the whole
tree that the draft model would have grown there. Any method and budget can then be played over it in the time that
retrieval and bookkeeping take, on a clock that passes models by their measured times. A pace that expands a node which
the full tree did not finds no children there.
"""

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from pipeline.acceptance import AcceptanceTable
from pipeline.budget import StepTimes
from pipeline.draft_forest import GrowingForest
from pipeline.economy import Economy
from pipeline.engine import Engine, EngineConfig
from pipeline.errors import InputError
from pipeline.growth import DraftOptions, grow_levels
from pipeline.methods import Method, build
from pipeline.pace import Pace
from pipeline.proposal import Draft, SlotView
from pipeline.request import Request, SamplingParams
from pipeline.sampling import Choices
from pipeline.scheduler import Work
from pipeline.search import Searcher
from pipeline.slots import Slot
from pipeline.target import Forward, Target
from pipeline.tree import TokenTree, places_in

_PAGE_SIZE = 32


@dataclass(frozen=True, slots=True)
class Costs:
    """What the models took on the machine of the recording.

    Attributes:
        rows, seconds: of the target's passes, as measured at start.
        level_fixed, level_row: seconds of a draft level, whatever its size and for each row.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    level_fixed: float
    level_row: float


@dataclass(frozen=True, slots=True)
class RecordedTree:
    """All that the draft model would say after one known text: tokens, parents [N] int32 and log-probabilities [N]."""

    tokens: np.ndarray
    parents: np.ndarray
    logprobs: np.ndarray


def draft_key(tokens: np.ndarray, seed: int) -> bytes:
    """What a draft depends on: the known tokens, [L] int32, and the noise of the sample."""
    return (seed % (1 << 64)).to_bytes(8, "little") + tokens.tobytes()


@dataclass(frozen=True, slots=True)
class Recording:
    """Generations and the drafts at all their places.

    Attributes:
        source: what it was made from and with.
        prompts, outputs: token ids.
        params, seeds: of each request.
        drafts: by `draft_key`.
        vocab_size: of the target.
    """

    source: Mapping[str, Any]
    prompts: Sequence[tuple[int, ...]]
    outputs: Sequence[tuple[int, ...]]
    params: SamplingParams
    seeds: Sequence[int]
    drafts: dict[bytes, RecordedTree]
    options: DraftOptions
    costs: Costs
    vocab_size: int

    def requests(self, passages: Sequence[tuple[np.ndarray, ...]] = ()) -> list[Request]:
        """The recorded requests; they end where their outputs did.

        Args:
            passages: found for each, see `Request`; none if empty.
        """
        found = passages or [()] * len(self.prompts)
        rows = zip(self.prompts, self.outputs, self.seeds, found, strict=True)
        return [
            Request(row, prompt, replace(self.params, max_new_tokens=len(output), ignore_eos=True), seed, texts)
            for row, (prompt, output, seed, texts) in enumerate(rows)
        ]

    def save(self, path: Path) -> None:
        """One .npz file, whole or absent.

        Raises:
            OSError: it cannot be written.
        """
        places = {
            draft_key(np.array([*prompt, *output[:end]], np.int32), self.seeds[row]): (row, end)
            for row, (prompt, output) in enumerate(zip(self.prompts, self.outputs, strict=True))
            for end in range(len(output))
        }
        items = [(places[key], tree) for key, tree in self.drafts.items() if key in places]
        facts = {"vocab_size": self.vocab_size, "params": asdict(self.params), "seeds": list(self.seeds)}
        facts |= {"source": dict(self.source), "options": asdict(self.options), "costs": asdict(self.costs)}
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
        np.savez_compressed(
            temporary,
            facts=np.array(json.dumps(facts)),
            prompts=np.concatenate([np.array(prompt, np.int32) for prompt in self.prompts]),
            prompt_sizes=np.array([len(prompt) for prompt in self.prompts]),
            outputs=np.concatenate([np.array(output, np.int32) for output in self.outputs]),
            output_sizes=np.array([len(output) for output in self.outputs]),
            places=np.array([place for place, _ in items], np.int32).reshape(-1, 2),
            sizes=np.array([len(tree.tokens) for _, tree in items]),
            tokens=_joined([tree.tokens for _, tree in items], np.int32),
            parents=_joined([tree.parents for _, tree in items], np.int16),
            logprobs=_joined([tree.logprobs for _, tree in items], np.float16),
        )

        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> "Recording":
        """What `save` wrote.

        Raises:
            InputError: it is no whole recording.
        """
        try:
            with np.load(path) as file:
                arrays = dict(file)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise InputError(
                f"{path} is no recording that can be read: {error}. Remove it, or name another."
            ) from error
        if "facts" not in arrays:
            raise InputError(f"{path} is no recording of rasd; name another file.")
        facts = json.loads(str(arrays["facts"]))
        prompts = _split(arrays["prompts"], arrays["prompt_sizes"])
        outputs = _split(arrays["outputs"], arrays["output_sizes"])
        columns = [_split(arrays[name], arrays["sizes"]) for name in ("tokens", "parents", "logprobs")]
        drafts = {}
        for (row, end), tokens, parents, logprobs in zip(arrays["places"].tolist(), *columns, strict=True):
            known = np.concatenate([prompts[row], outputs[row][:end]]).astype(np.int32)
            drafts[draft_key(known, facts["seeds"][row])] = RecordedTree(
                tokens, parents.astype(np.int32), logprobs.astype(np.float32)
            )
        return Recording(
            source=facts["source"],
            prompts=[tuple(prompt.tolist()) for prompt in prompts],
            outputs=[tuple(output.tolist()) for output in outputs],
            params=SamplingParams(**with_tuples(facts["params"])),
            seeds=facts["seeds"],
            drafts=drafts,
            options=DraftOptions(**facts["options"]),
            costs=Costs(**with_tuples(facts["costs"])),
            vocab_size=facts["vocab_size"],
        )


def with_tuples(facts: dict[str, Any]) -> dict[str, Any]:
    """Values read from JSON, which knows lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)


def _split(values: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sizes)[:-1])


class Clock:
    """Seconds that pass only by what models are said to take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class RecordedDrafter:
    """Grows its trees from a recording, as far as the pace wants, and moves the clock by what the levels took."""

    def __init__(self, recording: Recording, clock: Clock) -> None:
        self._recording = recording
        self._clock = clock

    def release(self, slot: int) -> None:
        """It keeps nothing of slots."""

    def draft(self, views: Sequence[SlotView], pace: Pace) -> Draft:
        recording, options, costs = self._recording, self._recording.options, self._recording.costs
        depths = [
            min(options.depth, view.max_depth) if draft_key(view.tokens, view.seed) in recording.drafts else 0
            for view in views
        ]
        forest = GrowingForest(depths, options.width, options.branches)

        def launch(level: int) -> Callable[[], None]:
            self._clock.now += costs.level_fixed + costs.level_row * len(forest.frontier)
            return lambda: forest.grow(*candidates(recording, views, forest))

        grow_levels(forest, pace, launch, self._clock)
        return Draft(forest.likeliest(options.num_nodes))


def candidates(recording: Recording, views: Sequence[SlotView], forest: GrowingForest) -> tuple[np.ndarray, np.ndarray]:
    """What the draft model said after each node of the frontier: log-probabilities and tokens, [F, k]; -inf where it
    was not asked."""
    logprobs = np.full((len(forest.frontier), recording.options.branches), -np.inf, np.float32)
    tokens = np.zeros(logprobs.shape, np.int64)
    for index, begin, end in zip(forest.views.tolist(), forest.begins[:-1], forest.begins[1:], strict=True):
        recorded = recording.drafts.get(draft_key(views[index].tokens, views[index].seed))
        if recorded is None:
            continue
        grown_tokens, grown_parents, _ = forest.tree(index)
        places = places_in(recorded.tokens, recorded.parents, grown_tokens, grown_parents)
        for row in range(begin, end):
            nodes = np.flatnonzero(recorded.parents == places[forest.frontier[row] + 1])
            logprobs[row, : len(nodes)] = recorded.logprobs[nodes]
            tokens[row, : len(nodes)] = recorded.tokens[nodes]
    return logprobs, tokens


def choices_along(tree: TokenTree, output: Sequence[int]) -> list[int]:
    """A target's choice after the root and after each node, [N + 1]; -1 where it is not asked.

    Args:
        output: all that it will say from here, at least one token.
    """
    said = [-1] * (len(tree) + 1)
    said[0] = output[0]
    node = -1
    for place, token in enumerate(output[:-1]):
        right = np.flatnonzero((tree.parents == node) & (tree.tokens == token))
        if not len(right):
            break
        node = int(right[0])
        said[node + 1] = output[place + 1]
    return said


class NoText:
    """A decoder for outputs of which nobody reads the text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str | list[str]:
        return ""


class ReplayEngine(Engine):
    """An engine whose target says what it said when it was recorded.

    Args:
        method: any; its drafter is the recording's.
        on_round: told of every tree that was proposed to a slot, of what was verified of it, of the target's choices
            along it, and of the request's parameters.
    """

    def __init__(
        self,
        recording: Recording,
        method: Method,
        *,
        num_slots: int = 1,
        budget: int | None = None,
        searchers: Sequence[Searcher] = (),
        on_round: Callable[[TokenTree, TokenTree, np.ndarray, SamplingParams], None] | None = None,
    ) -> None:
        self.clock = Clock()
        self._recording = recording
        self._on_round = on_round
        self._true_times = StepTimes(recording.costs.rows, recording.costs.seconds)
        times = StepTimes(recording.costs.rows, recording.costs.seconds) if budget is None else None
        acceptance = AcceptanceTable()
        economy = None if times is None else Economy(times, recording.options.depth)
        drafter = RecordedDrafter(recording, self.clock) if "draft" in method.sources else None
        proposers = build(method, acceptance, recording.vocab_size, searchers, drafter, economy)
        longest = max(len(p) + len(o) for p, o in zip(recording.prompts, recording.outputs, strict=True)) + 1
        num_pages = num_slots * (-(-longest // _PAGE_SIZE) + 4)
        cache = SimpleNamespace(page_size=_PAGE_SIZE)
        config = SimpleNamespace(vocab_size=recording.vocab_size)
        target = SimpleNamespace(
            cache=cache,
            move=lambda *_: None,
            num_pages=num_pages,
            config=config,
            device=torch.device("cpu"),
            is_shared=False,
        )
        engine = EngineConfig(num_slots, budget, prefill_chunk=1 << 30, max_context=longest)
        eos: Any = ()
        super().__init__(cast(Target, target), NoText(), eos, proposers, acceptance, engine, times, clock=self.clock)

    def requests(self, passages: Sequence[tuple[np.ndarray, ...]] = ()) -> list[Request]:
        """See `Recording.requests`."""
        return self._recording.requests(passages)

    def _verify(self, work: Work) -> tuple[Forward, Choices]:
        self._scheduler.take_copies()
        if self._lesson is not None:
            self._lesson()
        begins: list[int] = []
        choices: list[int] = []
        for slot, tree, wants_logits in zip(work.slots, work.trees, work.runs.wants_logits.tolist(), strict=True):
            begins.append(len(choices) if wants_logits else -1)
            if wants_logits:
                choices += self._said(slot, tree)
        rows = work.num_rows - work.num_prefill  # prefill costs every method the same
        if rows:
            self.clock.now += float(self._true_times(np.array([rows]))[0])
        return Forward(torch.empty(0), np.array(begins, np.int64)), Choices(np.array(choices, np.int64), None)

    def _said(self, slot: Slot, tree: TokenTree) -> list[int]:
        """The target's choice after the root and after each node."""
        said = choices_along(tree, self._recording.outputs[slot.request.request_id][slot.num_output :])
        if slot.num_output and self._on_round is not None:
            along = np.array([token for token in said if token >= 0])
            proposed = self._proposed[self._numbers.index(slot.number)]
            self._on_round(proposed, tree, along, slot.request.params)
        return said
