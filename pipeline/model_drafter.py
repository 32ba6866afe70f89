"""The drafter `model`: any causal language model with the target's tokenizer, over a paged KV cache of its own.

Trees grow in batch, one packed forward pass a level for all slots; a level computes its new nodes only. Nothing that
was computed for a tree is kept: accepted tokens come again, as known ones, in the next round's first pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.draft_tree import GrowingTree
from pipeline.growth import DraftOptions, Growth, drafted, grow, levels, logprobs_at_roots
from pipeline.pace import Pace
from pipeline.packing import Run
from pipeline.pages import PagePool, PageRun
from pipeline.proposal import Draft, SlotView
from pipeline.target import Target
from pipeline.tree import EMPTY_TREE

_MOST_BEHIND = 2048  # tokens that a round's first level computes again or for the first time; other slots wait


@dataclass(slots=True)
class _Slot:
    """Tokens of a slot whose keys and values are in the draft cache, and where."""

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    pages: PageRun = field(default_factory=PageRun)


class ModelDrafter:
    """Drafts with a model.

    Attributes:
        observer: told of every tree that has grown, for recordings; None if nobody is.

    Args:
        model: the draft model over its own KV pool.
    """

    def __init__(self, model: Target, options: DraftOptions) -> None:
        self.observer: Callable[[Growth], None] | None = None
        self._model = model
        self._options = options
        self._pool = PagePool(model.num_pages, model.cache.page_size)
        self._slots: dict[int, _Slot] = {}

    def release(self, slot: int) -> None:
        if (state := self._slots.pop(slot, None)) is not None:
            self._pool.release(state.pages)

    def draft(self, views: Sequence[SlotView], pace: Pace) -> Draft:
        growths: dict[int, Growth] = {}
        num_behind = 0
        for index, view in enumerate(views):
            growth = self._begin(view)
            if growth is not None and (not num_behind or num_behind + growth.num_behind <= _MOST_BEHIND):
                growths[index] = growth
                num_behind += growth.num_behind
        root_logprobs: torch.Tensor | None = None
        for level, working in levels(growths, self._options, pace):
            runs = [growth.run() if level else self._first_run(growth) for growth in working.values()]
            forward = self._model.forward(runs)
            logits = forward.logits.float()
            if level == 0 and pace.reads_root:
                root_logprobs = logprobs_at_roots(logits, forward.begin, list(working), len(views))
            grow(list(working.values()), logits, forward.begin, self._options)
        for growth in growths.values():
            if len(growth.tree.tokens):  # its root was seen
                self._slots[growth.view.slot].tokens = growth.view.tokens.copy()
            if self.observer is not None:
                self.observer(growth)
        return Draft(drafted(growths, len(views), self._options), root_logprobs)

    def _begin(self, view: SlotView) -> Growth | None:
        """A tree's beginning; None if nothing deeper than the root is wanted or its memory cannot be had."""
        depth = min(self._options.depth, view.max_depth)
        slot = self._slots.setdefault(view.slot, _Slot())
        common = min(len(slot.tokens), len(view.tokens) - 1)
        differs = np.flatnonzero(slot.tokens[:common] != view.tokens[:common])
        slot.tokens = slot.tokens[: differs[0] if len(differs) else common]
        if depth < 1 or not self._pool.grow(slot.pages, len(view.tokens) + self._options.num_scratch):
            return None
        num_behind = len(view.tokens) - 1 - len(slot.tokens)
        return Growth(view, slot.pages, GrowingTree(self._options.width), depth, num_behind)

    def _first_run(self, growth: Growth) -> Run:
        """The first level: the root, and before it the tokens that are not in the cache yet."""
        cached = len(self._slots[growth.view.slot].tokens)
        return Run(growth.view.tokens[cached:], EMPTY_TREE, cached, growth.pages, True)
