"""The drafter `head`: trees of a draft head, whose keys and values lie in the target's own pages.

A token's entry in the head's cache depends on the tokens up to it alone, as the target's does; so pages that slots
share, copy and release are the head's too. Entries of committed tokens wait in `HeadEntries` until a draft is wanted.
What is drafted goes to scratch pages behind the pool.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numba import njit

from pipeline.draft_forest import GrowingForest
from pipeline.growth import DraftOptions, Observer, grow, grow_levels, logprobs_at_roots, over_vocabulary
from pipeline.head import DraftHead
from pipeline.head_entries import HeadEntries
from pipeline.head_pass import HeadPasses, Outputs
from pipeline.kv_cache import KVShape, PagedCache
from pipeline.pace import Pace
from pipeline.packing import Runs
from pipeline.pages import block_table
from pipeline.proposal import Committed, Draft, SlotView


class HeadDrafter:
    """Drafts with a head.

    Attributes:
        observer: told of every tree that has grown, for recordings; None if nobody is.

    Args:
        head: on the target's device, in its dtype.
        num_pages, page_size: of the target's pool.
        num_slots: slots of the engine; each has scratch pages of its own.
        is_static: see `pipeline.head_pass.HeadPasses`.
        clock: tells seconds.
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
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        config = head.config
        self.observer: Observer | None = None
        self._clock = clock
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
        features = self._passes.features
        self._entries = HeadEntries(head, cache, features, num_slots, is_static=self._passes.is_static)
        self._num_slots = num_slots

    def release(self, slot: int) -> None:
        self._entries.release(slot)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Tokens were copied within the pool: pool token indices [n] -> [n]."""
        self._entries.copy(source, target)

    @torch.inference_mode()
    def commit(self, committed: Committed, states: torch.Tensor) -> None:
        """The target has computed these tokens."""
        self._entries.note(committed, states)

    @torch.inference_mode()
    def draft(self, views: Sequence[SlotView], pace: Pace) -> Draft:
        options = self._options
        depths = [
            min(options.depth, view.max_depth) if view.max_depth > 0 and self._entries.knows(view.slot) else 0
            for view in views
        ]
        forest = GrowingForest(depths, options.width, options.branches)
        scratch = (self._page_size, self._first_scratch, self._scratch_pages)
        places = _Places(views, *scratch, self._num_slots, options.num_scratch)
        root_logprobs: torch.Tensor | None = None

        def launch(level: int) -> Callable[[], None]:
            logits, top = self._level(views, forest, places)

            def finish() -> None:
                nonlocal root_logprobs
                if level == 0 and pace.reads_root:
                    whole = over_vocabulary(logits, self._head.token_ids, self._head.config.vocab_size)
                    root_logprobs = logprobs_at_roots(whole, forest.views, len(views))
                grow(forest, views, logits, options, self._head.token_ids, top)

            return finish

        grow_levels(forest, pace, launch, self._clock, prepare=self._entries.write)
        if self.observer is not None:
            for index in np.flatnonzero(depths).tolist():
                self.observer(views[index], *forest.tree(index))
        return Draft(forest.likeliest(options.num_nodes), root_logprobs)

    def _level(self, views: Sequence[SlotView], forest: GrowingForest, places: "_Places") -> Outputs:
        """What `HeadPasses.run` gives for the frontier."""
        return self._passes.run(*places.level(forest))


class _Places:
    """Where a draft's roots and nodes lie: in the cache, and in the table of features.

    Args:
        page_size: tokens a page.
        first_scratch, num_pages: pages of the first slot's scratch, of which each slot has so many.
        num_slots: the table's first rows are the slots' own; those behind are for roots and nodes.
        num_scratch: most nodes of a tree that are expanded below its root.
    """

    def __init__(
        self,
        views: Sequence[SlotView],
        page_size: int,
        first_scratch: int,
        num_pages: int,
        num_slots: int,
        num_scratch: int,
    ) -> None:
        self._slots = np.array([view.slot for view in views], np.int64)
        self._roots = np.array([view.tokens[-1] for view in views], np.int64)
        self._cached = np.array([len(view.tokens) - 1 for view in views], np.int32)
        held = block_table([view.pages for view in views])
        self._table = _with_scratch(held, self._cached, self._slots, page_size, first_scratch, num_pages)
        self._next = num_slots
        self._rows = np.empty((len(views), 1 + num_scratch), np.int64)  # of the root, then of the expanded nodes

    def level(self, forest: GrowingForest) -> tuple[Runs, np.ndarray]:
        """What a level has to compute: the frontier, below what was computed before.

        Returns:
            That, and rows of the table, [2, F] int64: of the token before each node, of a root the slot's; and of the
            node itself, one row behind the other.
        """
        seen, views = forest.seen(), forest.views
        ones = np.ones(len(views), np.int64)
        runs = Runs(
            known=self._roots[views],
            tokens=seen.tokens,
            parents=seen.parents,
            num_known=ones,
            num_nodes=seen.num_nodes,
            num_done=seen.num_done,
            cached=self._cached[views],
            wants_logits=ones > 0,
            block_table=self._table[views],
        )
        rows = _rows(self._rows, self._slots, forest.frontier_views, seen.places, seen.above, self._next)
        self._next += len(forest.frontier)
        return runs, rows


@njit(cache=True, nogil=True)
def _rows(
    table: np.ndarray, slots: np.ndarray, views: np.ndarray, places: np.ndarray, above: np.ndarray, first: int
) -> np.ndarray:
    """[2, F] rows of features that a level reads and writes; the latter are noted in `table`, [B, places]."""
    rows = np.empty((2, len(views)), np.int64)
    for i, view in enumerate(views):
        rows[0, i] = slots[view] if above[i] < 0 else table[view, above[i]]
        rows[1, i] = table[view, places[i]] = first + i
    return rows


@njit(cache=True, nogil=True)
def _with_scratch(
    held: np.ndarray, cached: np.ndarray, slots: np.ndarray, page_size: int, first_scratch: int, num_pages: int
) -> np.ndarray:
    """[S, B] int32 of each view the pages of the tokens before its root, then its slot's scratch pages.

    Args:
        held: [S, P] the slots' own pages, which may not reach to the root's; cached: [S] tokens before the root.
    """
    num_own = (cached + page_size - 1) // page_size
    table = np.zeros((len(held), (num_own.max() if len(held) else 0) + num_pages), np.int32)
    for view in range(len(held)):
        own = num_own[view]
        table[view, :own] = held[view, :own]
        for i in range(num_pages):
            table[view, own + i] = first_scratch + slots[view] * num_pages + i
    return table
