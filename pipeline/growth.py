"""Draft trees of several slots under way together: the part that is the same for every draft model.

A level is one pass of the draft model over the nodes to be expanded, of all slots; what it says are their candidates.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.draft_tree import GrowingTree, drafted_forest
from pipeline.forest import Forest
from pipeline.graphs import Graphs
from pipeline.noise import position_key
from pipeline.pace import Pace
from pipeline.packing import Run
from pipeline.pages import PageRun
from pipeline.proposal import SlotView
from pipeline.request import SamplingParams
from pipeline.sampling import ChoiceRow, perturbed_scores
from pipeline.tree import node_depths


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

    @property
    def num_scratch(self) -> int:
        """Most nodes that a draft model sees of a tree."""
        return self.width * max(self.depth - 1, 0)


@dataclass(slots=True)
class Growth:
    """A tree under way in one slot.

    Attributes:
        pages: of the draft model's cache, with room for the known tokens and what is expanded of the tree.
        depth: levels wanted.
        num_behind: tokens before the root that the first level has to compute, too.
    """

    view: SlotView
    pages: PageRun
    tree: GrowingTree
    depth: int
    num_behind: int = 0

    @property
    def num_rows(self) -> int:
        """Nodes to be expanded by the next level; the root before the first."""
        return max(self.tree.num_new, 1)

    def run(self) -> Run:
        """What a level after the first has to compute: the newest nodes, below what was computed before."""
        root = len(self.view.tokens) - 1
        done = 1 + len(self.tree.expanded) - self.tree.num_new
        return Run(self.view.tokens[root:], self.tree.expanded, root, self.pages, True, done)


def levels(
    growths: Mapping[int, Growth],
    options: DraftOptions,
    pace: Pace,
    clock: Callable[[], float] = time.perf_counter,
    prepare: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, dict[int, Growth]]]:
    """The levels to be computed, each with the trees that have nodes to expand, by view; times them.

    The trees must have grown by a level when the next is asked for. `prepare` is called before the first, if there is
    one; its time is no level's.
    """
    working = dict(growths)
    for level in range(options.depth):
        growing = {index: growth for index, growth in working.items() if level < growth.depth}
        trees = {index: growth.tree for index, growth in growing.items() if len(growth.tree.frontier)}
        kept = pace.expand(level, trees)
        working = {index: working[index] for index in kept}
        if not working:
            return
        if level:  # a root is expanded or not
            for index, growth in working.items():
                growth.tree.narrow(kept[index])
        num_rows = sum(growth.num_rows + (growth.num_behind if level == 0 else 0) for growth in working.values())
        if level == 0:
            prepare()
        begin, num_captures = clock(), Graphs.num_captures
        yield level, working
        if Graphs.num_captures == num_captures:
            pace.took(num_rows, clock() - begin)


def top_of(logits: torch.Tensor, branches: int, token_ids: torch.Tensor | None = None) -> torch.Tensor:
    """The likeliest tokens of each row, so that they reach the host in one copy.

    Args:
        logits: [M, V] float32; token_ids: see `grow`.

    Returns:
        [M, 2, branches] int32: the bits of their log-probabilities, and their ids.
    """
    top = logits.log_softmax(dim=-1).topk(branches, dim=-1)
    chosen = top.indices if token_ids is None else token_ids[top.indices]
    return torch.stack([top.values.view(torch.int32), chosen.to(torch.int32)], dim=1)


def grow(
    growths: Sequence[Growth],
    logits: torch.Tensor,
    begins: Sequence[int],
    options: DraftOptions,
    token_ids: torch.Tensor | None = None,
    top: torch.Tensor | None = None,
) -> None:
    """Adds a level to all trees.

    Args:
        logits: [M, V] float32, one row for each node to be expanded.
        begins: the first row of each tree.
        token_ids: [V] int64 token of each column of a draft model with a vocabulary of its own.
        top: `top_of` the logits, if it is known already.
    """
    if options.is_coupled and any(not growth.view.params.is_greedy for growth in growths):
        logits = perturbed_scores(logits, [row for growth in growths for row in _choice_rows(growth)], token_ids)
        top = None
    if top is None:
        top = top_of(logits, min(options.branches, logits.shape[-1]), token_ids)
    bits, tokens = top.cpu().numpy().swapaxes(0, 1)
    logprobs = bits.view(np.float32)
    for growth, begin in zip(growths, begins, strict=True):
        end = begin + growth.num_rows
        growth.tree.grow(logprobs[begin:end], tokens[begin:end])


def drafted(growths: Mapping[int, Growth], num_views: int, options: DraftOptions) -> Forest:
    """The finished tree of each view; empty for those that were not drafted for."""
    trees = {index: growth.tree for index, growth in growths.items()}
    return drafted_forest([trees.get(index) for index in range(num_views)], options.num_nodes)


def _choice_rows(growth: Growth) -> list[ChoiceRow]:
    """How the target will choose after each node of the frontier."""
    view, new = growth.view, growth.tree.num_new
    depths = node_depths(growth.tree.expanded.parents)[-new:].tolist() if new else [0]
    if view.params.is_greedy:
        greedy = ChoiceRow(SamplingParams())
        return [greedy] * len(depths)
    length = len(view.tokens)
    return [ChoiceRow(view.params, position_key(view.seed, length + depth)) for depth in depths]


def logprobs_at_roots(
    logits: torch.Tensor, begins: Sequence[int], places: Sequence[int], num_views: int
) -> torch.Tensor:
    """[S, V] the draft model's distribution after each view's root; uniform for views that it did not see.

    Args:
        logits: [M, V] of the first level; begins: the row of each tree; places: the view of each tree.
    """
    uniform = torch.full((num_views, logits.shape[1]), -float(np.log(logits.shape[1])), device=logits.device)
    uniform[list(places)] = logits[list(begins)].log_softmax(dim=-1)
    return uniform


def over_vocabulary(logits: torch.Tensor, token_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[M, D] over a draft vocabulary [D] int64 as [M, vocab_size]; -inf for tokens outside it."""
    whole = logits.new_full((len(logits), vocab_size), -torch.inf)
    whole[:, token_ids] = logits
    return whole
