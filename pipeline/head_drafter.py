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
        # One feature for each slot, and one for each node that a draft computes.
        num_features = num_slots * (2 + options.num_scratch)
        self._passes = HeadPasses(head, cache, num_features, num_slots, options.branches, is_static=is_static)
        self._entries = HeadEntries(head, cache, self._passes.features)
        self._num_slots = num_slots

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
        places = _Places(self._num_slots)
        root_logprobs: torch.Tensor | None = None
        for level, working in levels(growths, self._options, pace, prepare=self._entries.write):
            logits, top = self._level(working, places)
            begins = np.cumsum([0, *(growth.num_rows for growth in working.values())])[:-1].tolist()
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

    def _level(self, working: dict[int, Growth], places: "_Places") -> Outputs:
        """What `HeadPasses.run` gives for all nodes to be expanded, slot by slot."""
        runs = [growth.run() if growth.tree.num_new else _root_run(growth) for growth in working.values()]
        return self._passes.run(runs, places.before(working), places.take(working))


class _Places:
    """Which rows of the table of features belong to the nodes of all trees of a draft; a slot's own row has its number.

    Args:
        first: the first row for nodes.
    """

    def __init__(self, first: int) -> None:
        self._next = first
        self._rows: dict[int, np.ndarray] = {}  # by tree, of its root and expanded nodes

    def before(self, working: Mapping[int, Growth]) -> np.ndarray:
        """[M] int64 row of the token before each node to be expanded: of a root the slot's."""
        return np.concatenate([self._before(index, growth) for index, growth in working.items()])

    def _before(self, index: int, growth: Growth) -> np.ndarray:
        tree = growth.tree
        if not tree.num_new:
            return np.array([growth.view.slot])
        rows: np.ndarray = self._rows[index][tree.expanded.parents[-tree.num_new :] + 1]
        return rows

    def take(self, working: Mapping[int, Growth]) -> int:
        """Gives a level's nodes rows, tree by tree; returns the first."""
        first = self._next
        for index, growth in working.items():
            new = np.arange(self._next, self._next + growth.num_rows)
            self._rows[index] = np.concatenate([self._rows[index], new]) if index in self._rows else new
            self._next += growth.num_rows
        return first


def _root_run(growth: Growth) -> Run:
    tokens = growth.view.tokens
    return Run(tokens[-1:], EMPTY_TREE, len(tokens) - 1, growth.pages, True)
