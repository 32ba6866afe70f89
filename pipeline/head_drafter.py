"""The drafter `head`: trees of a draft head, whose keys and values lie in the target's own pages.

A token's entry in the head's cache depends on the tokens up to it alone, as the target's does; so pages that slots
share, copy and release are the head's too. Entries of committed tokens wait in `HeadEntries` until a draft is wanted.
What is drafted goes to scratch pages behind the pool.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from pipeline.draft_tree import GrowingTree
from pipeline.growth import DraftOptions, Growth, drafted, grow, levels, logprobs_at_roots, over_vocabulary
from pipeline.head import DraftHead
from pipeline.head_entries import HeadEntries
from pipeline.head_pass import HeadPasses, Outputs
from pipeline.kv_cache import KVShape, PagedCache
from pipeline.pace import Pace
from pipeline.packing import Run
from pipeline.pages import PageRun
from pipeline.proposal import Committed, Draft, SlotView
from pipeline.tree import EMPTY_TREE


class HeadDrafter:
    """Drafts with a head.

    Attributes:
        observer: told of every tree that has grown, for recordings; None if nobody is.

    Args:
        head: on the target's device, in its dtype.
        num_pages, page_size: of the target's pool.
        num_slots: slots of the engine; each has scratch pages of its own.
        is_static: see `pipeline.head_pass.HeadPasses`.
    """

    def __init__(
        self,
        head: DraftHead,
        num_pages: int,
        page_size: int,
        num_slots: int,
        options: DraftOptions,
        *,
        is_static: bool | None = None,
    ) -> None:
        config = head.config
        self.observer: Callable[[Growth], None] | None = None
        self._head = head
        self._options = options
        self._page_size = page_size
        self._scratch_pages = -(-(1 + options.num_scratch) // page_size) + 1
        self._first_scratch = num_pages
        weight = head.fuse.weight
        shape = KVShape(1, config.num_kv_heads, config.head_dim, weight.dtype)
        all_pages = num_pages + num_slots * self._scratch_pages + 1  # the last is nobody's
        cache = PagedCache(shape, all_pages, page_size, weight.device)
        self._passes = HeadPasses(head, cache, num_slots, options.branches, is_static=is_static)
        self._entries = HeadEntries(head, cache)

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
        known = _Known()
        root_logprobs: torch.Tensor | None = None
        for level, working in levels(growths, self._options, pace, prepare=self._entries.write):
            hidden, logits, top = self._level(working, known)
            begins = np.cumsum([0, *(growth.num_rows for growth in working.values())])[:-1].tolist()
            known.add(hidden, {index: growth.num_rows for index, growth in working.items()})
            if level == 0 and pace.reads_root:
                whole = over_vocabulary(logits, self._head.token_ids, self._head.config.vocab_size)
                root_logprobs = logprobs_at_roots(whole, begins, list(working), len(views))
            grow(list(working.values()), logits, begins, self._options, self._head.token_ids, top)
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

    def _level(self, working: dict[int, Growth], known: "_Known") -> Outputs:
        """What `HeadPasses.run` gives for all nodes to be expanded, slot by slot."""
        runs = [growth.run() if growth.tree.num_new else _root_run(growth) for growth in working.values()]
        if known.outputs is None:
            before = torch.cat([self._entries.before(growth.view.slot) for growth in working.values()])
        else:
            parents = {i: growth.tree.expanded.parents[-growth.tree.num_new :] for i, growth in working.items()}
            before = known.of(parents)
        return self._passes.run(runs, before)


class _Known:
    """The head's outputs for all nodes of all trees of a draft.

    Attributes:
        outputs: [R, H]; None before the first level.
    """

    def __init__(self) -> None:
        self.outputs: torch.Tensor | None = None
        self._rows: dict[int, np.ndarray] = {}  # by tree, rows of its root and expanded nodes

    def add(self, outputs: torch.Tensor, counts: Mapping[int, int]) -> None:
        """The newest level's, [M, H], so many of each tree."""
        row = 0 if self.outputs is None else len(self.outputs)
        self.outputs = outputs if self.outputs is None else torch.cat([self.outputs, outputs])
        for index, count in counts.items():
            new = np.arange(row, row + count)
            self._rows[index] = np.concatenate([self._rows[index], new]) if index in self._rows else new
            row += count

    def of(self, nodes: Mapping[int, np.ndarray]) -> torch.Tensor:
        """[M, H] of some nodes of trees, -1 the root."""
        assert self.outputs is not None
        rows = np.concatenate([self._rows[index][own + 1] for index, own in nodes.items()])
        return self.outputs[torch.from_numpy(rows).to(self.outputs.device)]


def _root_run(growth: Growth) -> Run:
    tokens = growth.view.tokens
    return Run(tokens[-1:], EMPTY_TREE, len(tokens) - 1, growth.pages, True)
