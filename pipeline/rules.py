"""How a round joins what was drafted with what was retrieved: where methods differ beyond their sources."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch

from pipeline.proposal import Draft
from pipeline.tree import EMPTY_TREE, TokenTree, fuse, path_values, prune


class Rule(Protocol):
    """One round's trees from its draft and its retrieved trees."""

    @property
    def looks_first(self) -> bool:
        """Whether what is retrieved decides for which slots the drafter works at all."""
        ...

    def wants_draft(self, retrieved: TokenTree) -> bool:
        """Whether a slot with this retrieved tree is drafted for; asked only of a rule that looks first."""
        ...

    def join(self, draft: Draft, retrieved: Sequence[TokenTree]) -> list[TokenTree]:
        """The tree of each slot."""
        ...


class FuseAll:
    """All that was proposed, equal paths made one."""

    looks_first: ClassVar[bool] = False

    def wants_draft(self, retrieved: TokenTree) -> bool:
        return True

    def join(self, draft: Draft, retrieved: Sequence[TokenTree]) -> list[TokenTree]:
        return [fuse(trees) for trees in zip(draft.trees, retrieved, strict=True)]


@dataclass(frozen=True, slots=True)
class FixedPruning(FuseAll):
    """RASD as published (arXiv 2503.03434, section 3.2): the draft model's distribution prunes what was retrieved.

    A retrieved tree keeps those of the root's children, with all below them, that are among the draft model's `rank`
    likeliest tokens or at least as likely as `probability`. Without a draft model everything stays.
    """

    rank: int = 10
    probability: float = 0.05

    def join(self, draft: Draft, retrieved: Sequence[TokenTree]) -> list[TokenTree]:
        if draft.root_logprobs is not None:
            rows = zip(retrieved, draft.root_logprobs, strict=True)
            retrieved = [self._pruned(tree, logprobs) for tree, logprobs in rows]
        return FuseAll.join(self, draft, retrieved)

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
class Switch:
    """SAM-Decoding (Hu et al., arXiv 2411.10666): a long match drafts a chain, else the draft model drafts its tree."""

    match: int = 5
    looks_first: ClassVar[bool] = True

    def wants_draft(self, retrieved: TokenTree) -> bool:
        top = retrieved.parents < 0
        return not top.any() or int(retrieved.matches[top].max()) < self.match

    def join(self, draft: Draft, retrieved: Sequence[TokenTree]) -> list[TokenTree]:
        pairs = zip(draft.trees, retrieved, strict=True)
        return [tree if self.wants_draft(found) else chain_of(found) for tree, found in pairs]


def chain_of(tree: TokenTree) -> TokenTree:
    """The path from the root that takes the likeliest child at every node."""
    keep = np.zeros(len(tree), np.bool_)
    node = -1
    while (children := np.flatnonzero(tree.parents == node)).size:
        node = int(children[np.argmax(tree.scores[children])])
        keep[node] = True
    return prune(tree, keep) if len(tree) else EMPTY_TREE
