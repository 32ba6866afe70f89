"""The drafter `model`: any causal language model with the target's tokenizer, over a paged KV cache of its own.

Trees grow in batch, one packed forward pass a level for all slots; a level computes its new nodes only. Nothing that
was computed for a tree is kept: accepted tokens come again, as known ones, in the next round's first pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.draft_tree import GrowingTree
from pipeline.noise import position_key
from pipeline.packing import Run
from pipeline.pages import PagePool, PageRun
from pipeline.proposal import Draft, SlotView
from pipeline.sampling import ChoiceRow, perturbed_scores
from pipeline.target import Target
from pipeline.tree import EMPTY_TREE, node_depths


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """The shape of draft trees.

    Attributes:
        depth: levels.
        width: nodes expanded a level.
        branches: candidates of each expanded node.
        num_nodes: most nodes of a tree.
        is_coupled: rank candidates of sampled requests with the noise that the target's own choice will use.
    """

    depth: int = 5
    width: int = 8
    branches: int = 8
    num_nodes: int = 64
    is_coupled: bool = True


@dataclass(slots=True)
class _Slot:
    """Tokens of a slot whose keys and values are in the draft cache, and where."""

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    pages: PageRun = field(default_factory=PageRun)


@dataclass(slots=True)
class _Growth:
    """A tree under way in one slot."""

    view: SlotView
    slot: _Slot
    tree: GrowingTree
    depth: int


class ModelDrafter:
    """Drafts with a model.

    Args:
        model: the draft model over its own KV pool.
    """

    def __init__(self, model: Target, options: DraftOptions) -> None:
        self._model = model
        self._options = options
        self._pool = PagePool(model.cache.keys.shape[1], model.cache.page_size)
        self._slots: dict[int, _Slot] = {}

    def release(self, slot: int) -> None:
        if (state := self._slots.pop(slot, None)) is not None:
            self._pool.release(state.pages)

    def draft(self, views: Sequence[SlotView]) -> Draft:
        if not views:
            return Draft([])
        growths = {index: growth for index, view in enumerate(views) if (growth := self._begin(view)) is not None}
        vocabulary = self._model.config.vocab_size
        root_logprobs = torch.full((len(views), vocabulary), -float(np.log(vocabulary)), device=self._model.device)
        for level in range(self._options.depth):
            working = {index: growth for index, growth in growths.items() if level < growth.depth}
            if not working:
                break
            logits, begins = self._expand(list(working.values()))
            if level == 0:
                root_logprobs[list(working)] = logits[begins].log_softmax(dim=-1)
        for growth in growths.values():
            growth.slot.tokens = growth.view.tokens.copy()
        grown = {index: growth.tree.tree(self._options.num_nodes) for index, growth in growths.items()}
        return Draft([grown.get(index, EMPTY_TREE) for index in range(len(views))], root_logprobs)

    def _begin(self, view: SlotView) -> _Growth | None:
        """A tree's beginning; None if nothing deeper than the root is wanted or its memory cannot be had."""
        depth = min(self._options.depth, view.max_depth)
        slot = self._slots.setdefault(view.slot, _Slot())
        common = min(len(slot.tokens), len(view.tokens) - 1)
        differs = np.flatnonzero(slot.tokens[:common] != view.tokens[:common])
        slot.tokens = slot.tokens[: differs[0] if len(differs) else common]
        room = len(view.tokens) + self._options.width * max(depth - 1, 0)
        if depth < 1 or not self._pool.grow(slot.pages, room):
            return None
        return _Growth(view, slot, GrowingTree(self._options.width), depth)

    def _expand(self, growths: Sequence[_Growth]) -> tuple[torch.Tensor, list[int]]:
        """One level of all trees; returns the logits of the pass, [M, V] float32, and the first row of each tree."""
        forward = self._model.forward([_run(growth) for growth in growths])
        logits = forward.logits.float()
        rows = [row for growth in growths for row in self._choice_rows(growth)]
        scores = perturbed_scores(logits, rows) if any(not row.params.is_greedy for row in rows) else logits
        top = scores.log_softmax(dim=-1).topk(min(self._options.branches, scores.shape[-1]), dim=-1)
        logprobs, tokens = top.values.cpu().numpy(), top.indices.cpu().numpy()
        for growth, begin in zip(growths, forward.begin, strict=True):
            end = begin + max(growth.tree.num_new, 1)
            growth.tree.grow(logprobs[begin:end], tokens[begin:end])
        return logits, forward.begin

    def _choice_rows(self, growth: _Growth) -> list[ChoiceRow]:
        """How the target will choose after each node of the frontier."""
        view, new = growth.view, growth.tree.num_new
        depths = node_depths(growth.tree.expanded.parents)[-new:].tolist() if new else [0]
        if view.params.is_greedy or not self._options.is_coupled:
            return [ChoiceRow(view.params)] * len(depths)
        length = len(view.tokens)
        return [ChoiceRow(view.params, position_key(view.seed, length + depth)) for depth in depths]


def _run(growth: _Growth) -> Run:
    """What the next level has to compute."""
    tokens, tree = growth.view.tokens, growth.tree
    if not tree.num_new:
        cached = len(growth.slot.tokens)
        return Run(tokens[cached:], EMPTY_TREE, cached, growth.slot.pages, True)
    root = len(tokens) - 1
    done = 1 + len(tree.expanded) - tree.num_new
    return Run(tokens[root:], tree.expanded, root, growth.slot.pages, True, done)
