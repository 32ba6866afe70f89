"""Draft trees of several slots under way together: the part that is the same for every draft model.

A level is one pass of the draft model over the nodes to be expanded, of all slots; what it says are their candidates.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.draft_forest import GrowingForest
from pipeline.graphs import Graphs
from pipeline.noise import position_key
from pipeline.pace import Pace
from pipeline.proposal import SlotView
from pipeline.request import SamplingParams
from pipeline.sampling import ChoiceRow, perturbed_scores

# Told of a finished tree: the view, and what `GrowingForest.tree` gives.
Observer = Callable[[SlotView, np.ndarray, np.ndarray, np.ndarray], None]


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


def grow_levels(
    forest: GrowingForest,
    pace: Pace,
    launch: Callable[[int], Callable[[], None]],
    clock: Callable[[], float] = time.perf_counter,
    prepare: Callable[[], None] = lambda: None,
    num_behind: np.ndarray | None = None,
) -> None:
    """Grows trees as far as the pace goes, and times levels.

    What is done while a level is computed would have to be done without it, too: its time is no level's.

    Args:
        launch: begins a level, of the forest's frontier as it is then, and returns what waits for it and adds it.
        prepare: called before the first level, if there is one; its time is no level's either.
        num_behind: [B] tokens before each root that the first level has to compute, too.
    """
    while len(forest.frontier):
        level = forest.level
        forest.narrow(pace.expand(level, forest))
        if not len(forest.frontier):
            return
        num_rows = len(forest.frontier)
        if level == 0:
            prepare()
            num_rows += 0 if num_behind is None else int(num_behind[forest.views].sum())
        begin, num_captures = clock(), Graphs.num_captures
        finish = launch(level)
        launched = clock()
        pace.meanwhile()
        beside = clock() - launched
        finish()
        if Graphs.num_captures == num_captures:
            pace.took(num_rows, clock() - begin - beside)


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
    forest: GrowingForest,
    views: Sequence[SlotView],
    logits: torch.Tensor,
    options: DraftOptions,
    token_ids: torch.Tensor | None = None,
    top: torch.Tensor | None = None,
) -> None:
    """Adds a level to all trees that have a frontier.

    Args:
        views: one a tree.
        logits: [F, V] float32, one row for each node of the frontier.
        token_ids: [V] int64 token of each column of a draft model with a vocabulary of its own.
        top: `top_of` the logits, if it is known already.
    """
    if options.is_coupled and any(not views[index].params.is_greedy for index in forest.views.tolist()):
        logits = perturbed_scores(logits, _choice_rows(forest, views), token_ids)
        top = None
    if top is None:
        top = top_of(logits, min(options.branches, logits.shape[-1]), token_ids)
    bits, tokens = top.cpu().numpy().swapaxes(0, 1)
    forest.grow(bits.view(np.float32), tokens)


def _choice_rows(forest: GrowingForest, views: Sequence[SlotView]) -> list[ChoiceRow]:
    """How the target will choose after each node of the frontier, all of which are at one depth."""
    rows: list[ChoiceRow] = []
    for index, count in zip(forest.views.tolist(), np.diff(forest.begins).tolist(), strict=True):
        view, row = views[index], ChoiceRow(SamplingParams())
        if not view.params.is_greedy:
            row = ChoiceRow(view.params, position_key(view.seed, len(view.tokens) + forest.level))
        rows += [row] * count
    return rows


def logprobs_at_roots(logits: torch.Tensor, places: np.ndarray, num_views: int) -> torch.Tensor:
    """[S, V] the draft model's distribution after each view's root; uniform for views that it did not see.

    Args:
        logits: [W, V] of the first level; places: [W] the view of each row.
    """
    uniform = torch.full((num_views, logits.shape[1]), -float(np.log(logits.shape[1])), device=logits.device)
    uniform[torch.from_numpy(places).to(logits.device)] = logits.log_softmax(dim=-1)
    return uniform


def over_vocabulary(logits: torch.Tensor, token_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[M, D] over a draft vocabulary [D] int64 as [M, vocab_size]; -inf for tokens outside it."""
    whole = logits.new_full((len(logits), vocab_size), -torch.inf)
    whole[:, token_ids] = logits
    return whole
