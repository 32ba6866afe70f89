"""How a round joins what was drafted with what was retrieved: where methods differ beyond their sources."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from pipeline.calibration import Calibration
from pipeline.economy import Economy
from pipeline.forest import Forest, fuse_forests
from pipeline.pace import EconomicPace, FullPace, Pace
from pipeline.proposal import Draft, SlotView
from pipeline.retrieval import Retrieval
from pipeline.tree import EMPTY_TREE, TokenTree, path_values, prune
from pipeline.verify import Outcome

Lesson = Callable[[Forest, Outcome], None]


class Rule:
    """One round's trees from its draft and its retrieved trees: all that was proposed, equal paths made one.

    Attributes:
        waits: whether all that is retrieved must be known before drafting begins.
    """

    waits: ClassVar[bool] = False

    @classmethod
    def for_engine(cls, economy: Economy | None) -> "Rule":
        """The rule of one engine, with what it may learn from.

        Args:
            economy: decides how far to draft; None if the budget is fixed.
        """
        return cls()

    def rests(self, num_slots: int) -> bool:
        """Whether this round, of so many requests under way, does without speculation; nothing else is asked of it then
        but `observe_round`."""
        return False

    @property
    def follows(self) -> bool:
        """Whether the drafter is told of requests that begin in this round."""
        return True

    def pace(self, views: Sequence[SlotView], retrieval: Retrieval) -> Pace:
        """How far the draft model goes this round, of which not all may be retrieved yet."""
        return FullPace(meanwhile=retrieval.poll)

    def join(self, views: Sequence[SlotView], draft: Draft, retrieved: Forest) -> Forest:
        """The tree of each view."""
        return fuse_forests([Forest.of(draft.trees), retrieved])

    def lesson(self) -> Lesson:
        """Who is told what became of the trees that `join` has just made, maybe in the next round."""
        return lambda trees, outcome: None

    def observe_round(self, num_slots: int, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A round without prefill verified so many rows and emitted so many tokens."""


@dataclass(frozen=True, slots=True)
class FixedPruning(Rule):
    """RASD as published (arXiv 2503.03434, section 3.2): the draft model's distribution prunes what was retrieved.

    A retrieved tree keeps those of the root's children, with all below them, that are among the draft model's `rank`
    likeliest tokens or at least as likely as `probability`. Without a draft model everything stays.
    """

    rank: int = 10
    probability: float = 0.05

    def pace(self, views: Sequence[SlotView], retrieval: Retrieval) -> Pace:
        return FullPace(reads_root=True, meanwhile=retrieval.poll)

    def join(self, views: Sequence[SlotView], draft: Draft, retrieved: Forest) -> Forest:
        if draft.root_logprobs is not None:
            rows = zip(retrieved, draft.root_logprobs, strict=True)
            retrieved = Forest.of([self._pruned(tree, logprobs) for tree, logprobs in rows])
        return Rule.join(self, views, draft, retrieved)

    def _pruned(self, tree: TokenTree, logprobs: torch.Tensor) -> TokenTree:
        """Args: logprobs: [V]."""
        if len(tree) == 0:
            return tree
        top = tree.parents < 0
        tokens = torch.from_numpy(tree.tokens[top].astype(np.int64)).to(logprobs.device)
        own = logprobs[tokens]
        least = logprobs.topk(min(self.rank, len(logprobs))).values[-1]
        stays = (own >= least) | (own >= float(np.log(self.probability)))
        values = np.ones(len(tree), np.float32)
        values[top] = stays.cpu().numpy()
        return prune(tree, path_values(tree.parents, values) > 0)


@dataclass(frozen=True, slots=True)
class Switch(Rule):
    """SAM-Decoding (Hu et al., arXiv 2411.10666): a long match drafts a chain, else the draft model drafts its tree."""

    match: int = 5
    waits: ClassVar[bool] = True

    def pace(self, views: Sequence[SlotView], retrieval: Retrieval) -> Pace:
        return FullPace(wanted=frozenset(i for i, tree in enumerate(retrieval.trees) if not self._is_long(tree)))

    def join(self, views: Sequence[SlotView], draft: Draft, retrieved: Forest) -> Forest:
        pairs = zip(draft.trees, retrieved, strict=True)
        return Forest.of([chain_of(found) if self._is_long(found) else tree for tree, found in pairs])

    def _is_long(self, retrieved: TokenTree) -> bool:
        top = retrieved.parents < 0
        return bool(top.any()) and int(retrieved.matches[top].max()) >= self.match


class Calibrated(Rule):
    """RASD with one scale of estimated acceptance for all sources, learned online, and drafting as far as it pays.

    Args:
        economy: decides how far to draft; None drafts in full, for a fixed budget.
    """

    def __init__(self, economy: Economy | None = None, calibration: Calibration | None = None) -> None:
        self._economy = economy
        self._calibration = calibration or Calibration()
        self._pace: EconomicPace | None = None  # of this round
        self._is_sampled = np.empty(0, np.bool_)  # by view
        self._found = Forest.empty(0)  # what the pace knows of what is retrieved

    @classmethod
    def for_engine(cls, economy: Economy | None) -> "Rule":
        return cls(economy)

    def rests(self, num_slots: int) -> bool:
        return self._economy is not None and num_slots > 0 and self._economy.resting.begin_round(num_slots)

    @property
    def follows(self) -> bool:
        return self._economy is None or self._economy.resting.follows

    def pace(self, views: Sequence[SlotView], retrieval: Retrieval) -> Pace:
        self._is_sampled = np.array([not view.params.is_greedy for view in views], np.bool_)
        if self._economy is None:
            return FullPace(meanwhile=retrieval.poll)

        def newly_found() -> Forest | None:
            if not retrieval.poll():
                return None
            self._found = retrieval.trees
            return self._scored(retrieval.trees)

        self._found = retrieval.trees
        self._pace = EconomicPace(
            self._economy, self._scored(retrieval.trees), newly_found, is_beside=retrieval.is_beside
        )
        return self._pace

    def join(self, views: Sequence[SlotView], draft: Draft, retrieved: Forest) -> Forest:
        trees = self._scored(Rule.join(self, views, draft, retrieved))
        if self._pace is not None and retrieved is not self._found and self._pace.num_expanded.any():
            self._pace.learn(self._scored(retrieved))
        return trees

    def lesson(self) -> Lesson:
        economy, pace, is_sampled = self._economy, self._pace, self._is_sampled

        def learn(trees: Forest, outcome: Outcome) -> None:
            if economy is not None and pace is not None:
                economy.observe_trees(trees, pace.num_expanded)
                economy.observe_levels(pace.gains, pace.nets)
                pace.observe(trees, outcome)
            self._calibration.observe(trees, outcome, is_sampled)

        return learn

    def observe_round(self, num_slots: int, num_rows: int, num_tokens: int, seconds: float) -> None:
        if self._economy:
            self._economy.observe_round(num_slots, num_rows, num_tokens, seconds)

    def _scored(self, trees: Forest) -> Forest:
        return self._calibration.scored(trees, self._is_sampled)


def chain_of(tree: TokenTree) -> TokenTree:
    """The path from the root that takes the likeliest child at every node."""
    keep = np.zeros(len(tree), np.bool_)
    node = -1
    while (children := np.flatnonzero(tree.parents == node)).size:
        node = int(children[np.argmax(tree.scores[children])])
        keep[node] = True
    return prune(tree, keep) if len(tree) else EMPTY_TREE
