"""The drafter `model`: any causal language model with the target's tokenizer, over a paged KV cache of its own.

Trees grow in batch, one packed forward pass a level for all slots; a level computes its new nodes only. Nothing that
was computed for a tree is kept: accepted tokens come again, as known ones, in the next round's first pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.draft_forest import GrowingForest
from pipeline.growth import DraftOptions, Observer, grow, grow_levels, logprobs_at_roots
from pipeline.pace import Pace
from pipeline.packing import Run, Runs
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
        self.observer: Observer | None = None
        self._model = model
        self._options = options
        self._pool = PagePool(model.num_pages, model.cache.page_size)
        self._slots: dict[int, _Slot] = {}

    def release(self, slot: int) -> None:
        if (state := self._slots.pop(slot, None)) is not None:
            self._pool.release(state.pages)

    def draft(self, views: Sequence[SlotView], pace: Pace) -> Draft:
        num_behind = np.zeros(len(views), np.int64)
        depths = [0] * len(views)
        for index, view in enumerate(views):
            behind = self._begin(view)
            if behind is not None and (not num_behind.any() or num_behind.sum() + behind <= _MOST_BEHIND):
                num_behind[index], depths[index] = behind, self._depth(view)
        options = self._options
        forest = GrowingForest(depths, options.width, options.branches)
        root_logprobs: torch.Tensor | None = None
        seen: list[int] = []

        def launch(level: int) -> Callable[[], None]:
            working = zip(forest.views.tolist(), np.diff(forest.begins).tolist(), strict=True)
            runs = [self._run(views[index], forest, index, num_new) for index, num_new in working]
            forward = self._model.forward(Runs.of(runs, self._pool.page_size))

            def finish() -> None:
                nonlocal root_logprobs
                logits = forward.logits.float()
                if level == 0:
                    seen.extend(forest.views.tolist())
                    if (np.diff(forward.begin) < 0).any():  # long chains of known tokens come behind short ones
                        logits = logits[torch.from_numpy(forward.begin).to(logits.device)]
                    if pace.reads_root:
                        root_logprobs = logprobs_at_roots(logits, forest.views, len(views))
                grow(forest, views, logits, options)

            return finish

        grow_levels(forest, pace, launch, num_behind=num_behind)
        for index in seen:
            self._slots[views[index].slot].tokens = views[index].tokens.copy()
        if self.observer is not None:
            for index in np.flatnonzero(depths).tolist():
                self.observer(views[index], *forest.tree(index))
        return Draft(forest.likeliest(options.num_nodes), root_logprobs)

    def _depth(self, view: SlotView) -> int:
        return min(self._options.depth, view.max_depth)

    def _begin(self, view: SlotView) -> int | None:
        """How many tokens before the root are not in the cache; None if nothing deeper than the root is wanted or the
        memory for it cannot be had."""
        slot = self._slots.setdefault(view.slot, _Slot())
        common = min(len(slot.tokens), len(view.tokens) - 1)
        differs = np.flatnonzero(slot.tokens[:common] != view.tokens[:common])
        slot.tokens = slot.tokens[: differs[0] if len(differs) else common]
        if self._depth(view) < 1 or not self._pool.grow(slot.pages, len(view.tokens) + self._options.num_scratch):
            return None
        return len(view.tokens) - 1 - len(slot.tokens)

    def _run(self, view: SlotView, forest: GrowingForest, index: int, num_new: int) -> Run:
        """What a level computes: at first the root and before it the tokens that are not in the cache yet, then the
        newest nodes, below what was computed before."""
        slot, root = self._slots[view.slot], len(view.tokens) - 1
        if forest.level == 0:
            cached = len(slot.tokens)
            return Run(view.tokens[cached:], EMPTY_TREE, cached, slot.pages, True)
        tree = forest.expanded_of(index)
        return Run(view.tokens[root:], tree, root, slot.pages, True, 1 + len(tree) - num_new)
