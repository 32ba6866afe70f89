"""Who proposes tokens: the two protocols every drafter and retriever implements, and the drafter that drafts nothing.

Both see the same views of the slots that decode in this round and return one tree a view. An empty draft is an empty
tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from pipeline.pace import Pace
from pipeline.pages import PageRun
from pipeline.request import SamplingParams
from pipeline.tree import EMPTY_TREE, TokenTree


class SlotView(NamedTuple):
    """What a proposer may know of a slot.

    Attributes:
        slot: number of the slot, stable from `admit` to `release`.
        tokens: [L] int32 all known tokens; the last is the root. A view: valid in this round only.
        max_depth: deepest node that can still be of use.
        params, seed: how the target chooses, see `pipeline.request.Request`.
        pages: where the target's keys and values of the tokens before the root lie.
    """

    slot: int
    tokens: np.ndarray
    max_depth: int
    params: SamplingParams = SamplingParams()
    seed: int = 0
    pages: PageRun = PageRun()


@dataclass(frozen=True, slots=True)
class Committed:
    """Tokens of S slots that the target has computed for good, side by side.

    Attributes:
        slots: [S] their numbers.
        begins: [S + 1] int64 where each one's tokens begin.
        tokens: [N] int32.
        positions, places: [N] int64 their places in their sequences, and in the pool.
    """

    slots: Sequence[int]
    begins: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    places: np.ndarray


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafter's proposals.

    Attributes:
        trees: one a view.
        root_logprobs: [S, V] the draft model's distribution after each root, which prunes retrieved trees; None
            without a model, or if the pace does not read it.
    """

    trees: Sequence[TokenTree]
    root_logprobs: torch.Tensor | None = None


class Drafter(Protocol):
    """Proposes from a model."""

    def draft(self, views: Sequence[SlotView], pace: Pace) -> Draft:
        """One tree for each view, as deep and as wide as the pace allows."""
        ...

    def release(self, slot: int) -> None:
        """The slot's request is gone."""
        ...


@runtime_checkable
class FeatureDrafter(Drafter, Protocol):
    """A drafter that reads the target's hidden states and keeps its cache in the target's pages."""

    def commit(self, committed: Committed, states: torch.Tensor) -> None:
        """The target has computed these tokens.

        Args:
            states: [N, 3 H] their hidden states at the depths that the drafter reads.
        """
        ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Tokens were copied within the pool: pool token indices [n] -> [n]."""
        ...


class Retriever(Protocol):
    """Proposes from text seen before. `admit`, `extend` and `release` keep it in step with the slots."""

    def admit(self, slot: int, tokens: np.ndarray, passages: Sequence[np.ndarray]) -> None:
        """A request with these known tokens, [L] int32, took the slot; passages, [n] int32 each, were found for it."""
        ...

    def extend(self, slot: int, tokens: np.ndarray) -> None:
        """The slot's output grew by these tokens, [n] int32."""
        ...

    def release(self, slot: int) -> None:
        """The slot's request is gone."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether `lookup` would answer without waiting for another process."""
        ...

    def send(self, views: Sequence[SlotView]) -> None:
        """Starts what takes time, so that it goes on while the drafter works, before its first level or while a device
        computes that; `lookup` with the same views follows."""
        ...

    def lookup(self, views: Sequence[SlotView]) -> Sequence[TokenTree]:
        """One tree for each view."""
        ...


class NullDrafter:
    """Drafts nothing: with no retriever beside it, this is plain decoding."""

    def draft(self, views: Sequence[SlotView], pace: Pace) -> Draft:
        return Draft([EMPTY_TREE] * len(views))

    def release(self, slot: int) -> None:
        """There is nothing to let go of."""
