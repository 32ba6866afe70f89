"""The drafter `head`: trees of a draft head, whose keys and values lie in the target's own pages.

A token's entry in the head's cache depends on the tokens up to it alone, as the target's does; so pages that slots
share, copy and release are the head's too. Entries of committed tokens wait in `HeadEntries` until a draft is wanted.
What is drafted goes to scratch pages behind the pool.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from pipeline.attention import AttentionContext, rasd_attention
from pipeline.draft_tree import GrowingTree
from pipeline.growth import DraftOptions, Growth, drafted, grow, levels, logprobs_at_roots, over_vocabulary
from pipeline.head import DraftHead
from pipeline.head_entries import HeadEntries
from pipeline.kv_cache import KVShape, PagedCache
from pipeline.pace import Pace
from pipeline.packing import PackedRow, Run, pack
from pipeline.pages import PageRun
from pipeline.proposal import Committed, Draft, SlotView
from pipeline.tree import EMPTY_TREE


class _Layer(torch.nn.Module):
    """What the attention function asks of its module."""

    layer_idx = 0


class HeadDrafter:
    """Drafts with a head.

    Attributes:
        observer: told of every tree that has grown, for recordings; None if nobody is.

    Args:
        head: on the target's device, in its dtype.
        num_pages, page_size: of the target's pool.
        num_slots: slots of the engine; each has scratch pages of its own.
    """

    def __init__(self, head: DraftHead, num_pages: int, page_size: int, num_slots: int, options: DraftOptions) -> None:
        config = head.config
        self.observer: Callable[[Growth], None] | None = None
        self._head = head
        self._options = options
        self._page_size = page_size
        self._scratch_pages = -(-(1 + options.num_scratch) // page_size) + 1
        self._first_scratch = num_pages
        weight = head.fuse.weight
        shape = KVShape(1, config.num_kv_heads, config.head_dim, weight.dtype)
        self._cache = PagedCache(shape, num_pages + num_slots * self._scratch_pages, page_size, weight.device)
        self._layer = _Layer()
        self._entries = HeadEntries(head, self._cache)

    def release(self, slot: int) -> None:
        self._entries.release(slot)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Tokens were copied within the pool: pool token indices [n] -> [n]."""
        self._entries.copy(source, target)

    @torch.inference_mode()
    def commit(self, committed: Sequence[Committed], states: torch.Tensor) -> None:
        """The target has computed these tokens."""
        self._entries.note(committed, states)

    @torch.inference_mode()
    def draft(self, views: Sequence[SlotView], pace: Pace) -> Draft:
        growths = {index: growth for index, view in enumerate(views) if (growth := self._begin(view)) is not None}
        outputs: dict[int, torch.Tensor] = {}  # of each tree: [1 + expanded, H], the root's first
        root_logprobs: torch.Tensor | None = None
        for level, working in levels(growths, self._options, pace, prepare=self._entries.write):
            hidden = self._level(working, outputs)
            logits = self._head.logits(hidden).float()
            begins = np.cumsum([0, *(growth.num_rows for growth in working.values())])[:-1].tolist()
            for (index, growth), begin in zip(working.items(), begins, strict=True):
                new = hidden[begin : begin + growth.num_rows]
                outputs[index] = torch.cat([outputs[index], new]) if level else new
            if level == 0 and pace.reads_root:
                whole = over_vocabulary(logits, self._head.token_ids, self._head.config.vocab_size)
                root_logprobs = logprobs_at_roots(whole, begins, list(working), len(views))
            grow(list(working.values()), logits, begins, self._options, self._head.token_ids)
        if self.observer is not None:
            for growth in growths.values():
                self.observer(growth)
        return Draft(drafted(growths, len(views), self._options), root_logprobs)

    def _begin(self, view: SlotView) -> Growth | None:
        depth = min(self._options.depth, view.max_depth)
        if depth < 1 or not self._entries.knows(view.slot):
            return None
        full = (len(view.tokens) - 1) // self._page_size  # pages before the root's
        held = view.pages.pages[: full + 1]
        if (len(view.tokens) - 1) % self._page_size == 0:
            held = held[:full]  # the root begins a page, which the slot may not have yet
        first = self._first_scratch + view.slot * self._scratch_pages
        scratch = range(first, first + self._scratch_pages)
        return Growth(view, PageRun(pages=[*held, *scratch]), GrowingTree(self._options.width), depth)

    def _level(self, working: dict[int, Growth], outputs: dict[int, torch.Tensor]) -> torch.Tensor:
        """The layer's output for all nodes to be expanded, [M, H], slot by slot."""
        growths = list(working.values())
        runs = [growth.run() if growth.tree.num_new else _root_run(growth) for growth in growths]
        row = pack(runs, len(runs), self._page_size, self._cache.device)
        before = []
        for index, growth in working.items():
            if not growth.tree.num_new:
                before.append(self._entries.before(growth.view.slot))
            else:
                parents = growth.tree.expanded.parents[-growth.tree.num_new :].astype(np.int64)
                before.append(outputs[index][torch.from_numpy(parents + 1).to(row.token_ids.device)])
        return self._attend(row, torch.cat(before))

    def _attend(self, row: PackedRow, features: torch.Tensor) -> torch.Tensor:
        inputs = self._head.inputs(row.token_ids[0], features)
        query, key, value = self._head.heads(inputs, row.position_ids[0])
        self._cache.begin(row)
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))  # [1, heads, C, D]
        self._cache.update(key, value, 0)
        attended, _ = rasd_attention(self._layer, query, key, value, None, packed=AttentionContext(row, self._cache))
        return self._head.close(self._head.residual(inputs, features), attended[0].flatten(1))


def _root_run(growth: Growth) -> Run:
    tokens = growth.view.tokens
    return Run(tokens[-1:], EMPTY_TREE, len(tokens) - 1, growth.pages, True)
