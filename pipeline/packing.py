"""One round's work as one packed row [1, T]: every slot's run of known tokens and tree nodes, side by side.

Linear layers see no padding. Positions, cache places and visibility are per node, so a slot may bring one node, a
tree of 60 or a prefill chunk of 500. Pure arithmetic over arrays; no slot state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit

from pipeline.pages import PageRun, block_table
from pipeline.tree import TokenTree

LONG_CHAIN = 24  # chains at least this long are packed last: on a CPU matrix products win there (docs/LOG.md)
_NO_MASK = -1


@dataclass(frozen=True, slots=True)
class Run:
    """One slot's part of a round: known tokens not yet cached, the last of them the root, and the tree below it.

    Attributes:
        known: [C] int32, a chain; C = 1 when decoding, more in prefill.
        tree: candidates below the root; empty in prefill.
        cached: tokens of the slot already in the cache.
        pages: the slot's pages, with room for cached + C + len(tree) tokens.
        wants_logits: whether the root and the tree need logits; False in a prefill chunk that does not reach the root.
        num_done: leading nodes of known + tree whose keys and values an earlier pass wrote where this run has them:
            they are seen, not computed again. This is how a tree grows level by level.
    """

    known: np.ndarray
    tree: TokenTree
    cached: int
    pages: PageRun
    wants_logits: bool
    num_done: int = 0

    def __len__(self) -> int:
        return len(self.known) + len(self.tree)


@dataclass(frozen=True, slots=True)
class Runs:
    """S runs side by side: the columns of `Run`, those of one after those of the other.

    Attributes:
        known: [all known] tokens; tokens, parents: [N] of the trees' nodes.
        num_known, num_nodes: [S] int64 how many of each are a run's.
        num_done, cached: [S] int32; wants_logits: [S] bool.
        block_table: [S, B] int32.
    """

    known: np.ndarray
    tokens: np.ndarray
    parents: np.ndarray
    num_known: np.ndarray
    num_nodes: np.ndarray
    num_done: np.ndarray
    cached: np.ndarray
    wants_logits: np.ndarray
    block_table: np.ndarray

    @staticmethod
    def of(runs: Sequence[Run], page_size: int) -> "Runs":
        """These runs, one at least."""
        assert all(len(run.pages.pages) * page_size >= run.cached + len(run) for run in runs)
        return Runs(
            known=np.concatenate([run.known for run in runs]),
            tokens=np.concatenate([run.tree.tokens for run in runs]),
            parents=np.concatenate([run.tree.parents for run in runs]),
            num_known=np.array([len(run.known) for run in runs], np.int64),
            num_nodes=np.array([len(run.tree) for run in runs], np.int64),
            num_done=np.array([run.num_done for run in runs], np.int32),
            cached=np.array([run.cached for run in runs], np.int32),
            wants_logits=np.array([run.wants_logits for run in runs], np.bool_),
            block_table=block_table([run.pages for run in runs]),
        )

    def __len__(self) -> int:
        return len(self.num_known)

    @property
    def lengths(self) -> np.ndarray:
        """[S] nodes of each run, those done included."""
        lengths: np.ndarray = self.num_known + self.num_nodes
        return lengths

    @property
    def num_computed(self) -> np.ndarray:
        """[S] nodes of each run that the pass computes."""
        counts: np.ndarray = self.lengths - self.num_done
        return counts

    @property
    def num_logits(self) -> np.ndarray:
        """[S] rows of logits of each run: the root's if that is computed, and those of the tree nodes that are."""
        counts: np.ndarray = self.wants_logits * (self.lengths - np.maximum(self.num_done, self.num_known - 1))
        return counts

    def columns(self, page_size: int) -> Any:
        """What `packed` takes, in its types."""
        assert (self.num_known[self.num_nodes > 0] == 1).all()
        return (
            self.known.astype(np.int64, copy=False),
            self.tokens.astype(np.int64, copy=False),
            self.parents.astype(np.int32, copy=False),
            *(self.num_known, self.num_nodes, self.num_done, self.cached, self.wants_logits, self.block_table),
            page_size,
        )

    def taken(self, order: np.ndarray) -> "Runs":
        """These runs in another order, [S] integers."""

        def parts(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
            ends = np.cumsum(counts)
            return np.concatenate([values[ends[i] - counts[i] : ends[i]] for i in order])

        return Runs(
            *(parts(self.known, self.num_known), parts(self.tokens, self.num_nodes)),
            *(parts(self.parents, self.num_nodes), self.num_known[order], self.num_nodes[order]),
            *(self.num_done[order], self.cached[order], self.wants_logits[order], self.block_table[order]),
        )


@dataclass(frozen=True, slots=True)
class Packed:
    """All runs of a round as arrays of T nodes, of which C <= T are computed.

    Attributes:
        nodes: [3, C] int64 token, position, and pool token index (page * page_size + offset) of each one's entry.
        logits_index: [M] int64 which of the C need logits, in order.
        computed: [C] int64 their places among the T nodes; None if these are all.
        num_done: [S] int32, leading nodes of each run that are not computed.
        starts: [S + 1] int32, the range of each run.
        cached: [S] int32, tokens in the cache before each run.
        block_table: [S, B] int32.
        positions: [T] int32.
        mask, mask_starts: visibility inside tree runs, see `pipeline.cpu_attention.AttentionBatch`.
        page_size: tokens a page.
        num_short: the first `num_short` runs are trees or short chains, the others long chains (prefill chunks).
    """

    nodes: np.ndarray
    logits_index: np.ndarray
    computed: np.ndarray | None
    num_done: np.ndarray
    starts: np.ndarray
    cached: np.ndarray
    block_table: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    mask_starts: np.ndarray
    page_size: int
    num_short: int


class PackedRow:
    """The same for a model on a device.

    Attributes:
        token_ids, position_ids: [1, C] int64 tensors.
        write_index, logits_index, computed: see `Packed.nodes` and `Packed`, as tensors.
        arrays: what it was made of.
        scratch: what attention derives from the row once for all layers.
    """

    def __init__(self, arrays: Packed, device: torch.device) -> None:
        nodes = torch.from_numpy(arrays.nodes).to(device)
        self.token_ids, self.position_ids, self.write_index = nodes[:1], nodes[1:2], nodes[2]
        self.logits_index = torch.from_numpy(arrays.logits_index).to(device)
        self.computed = None if arrays.computed is None else torch.from_numpy(arrays.computed).to(device)
        self.arrays = arrays
        self.scratch: dict[object, object] = {}


def short_first(runs: Runs) -> tuple[Runs, np.ndarray | None, int]:
    """Long chains behind all others; the place that each of the runs had before, None if that is so already, and how
    many are short."""
    is_long = (runs.num_known >= LONG_CHAIN) & (runs.num_nodes == 0)
    num_short = len(runs) - int(np.count_nonzero(is_long))
    if not is_long[:num_short].any():
        return runs, None, num_short
    order = np.argsort(is_long, kind="stable")
    return runs.taken(order), order, num_short


def pack(runs: Runs, num_short: int, page_size: int) -> Packed:
    """Packs runs, already ordered short first, into one row."""
    starts, mask_starts, nodes, computed, logits_index, positions, mask = packed(*runs.columns(page_size))
    return Packed(
        nodes=nodes,
        logits_index=logits_index,
        computed=None if len(computed) == len(positions) else computed,
        num_done=runs.num_done,
        starts=starts,
        cached=runs.cached,
        block_table=runs.block_table,
        positions=positions,
        mask=mask,
        mask_starts=mask_starts,
        page_size=page_size,
        num_short=num_short,
    )


@njit(cache=True, nogil=True)
def packed(
    known: np.ndarray,
    tokens: np.ndarray,
    parents: np.ndarray,
    num_known: np.ndarray,
    num_nodes: np.ndarray,
    num_done: np.ndarray,
    cached: np.ndarray,
    wants_logits: np.ndarray,
    table: np.ndarray,
    page_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What `pack` fills.

    Returns:
        Starts [S + 1] int32 and mask starts [S] int64; token, position and pool index of the nodes computed, [3, C]
        int64, their places among all, [C] int64, and which of them need logits, [M] int64; positions [T] and the mask.
    """
    num_runs = len(num_known)
    starts, mask_starts = np.zeros(num_runs + 1, np.int32), np.full(num_runs, _NO_MASK, np.int64)
    mask_size, num_computed, num_logits = 0, 0, 0
    for run in range(num_runs):
        length = num_known[run] + num_nodes[run]
        starts[run + 1] = starts[run] + length
        num_computed += length - num_done[run]
        if wants_logits[run]:
            num_logits += length - max(num_done[run], num_known[run] - 1)
        if num_nodes[run]:
            mask_starts[run] = mask_size
            mask_size += (num_nodes[run] + 1) ** 2
    nodes = np.empty((3, num_computed), np.int64)
    computed, logits_index = np.empty(num_computed, np.int64), np.empty(num_logits, np.int64)
    positions = np.empty(starts[-1], np.int32)
    mask = np.zeros(mask_size, np.bool_)
    at_known, at_node, at, at_logits = 0, 0, 0, 0
    for run in range(num_runs):
        begin, root = starts[run], starts[run] + num_known[run] - 1
        for i in range(begin, starts[run + 1]):
            if i <= root:
                token = known[at_known + i - begin]
                positions[i] = cached[run] + i - begin
            else:
                node = at_node + i - root - 1
                token = tokens[node]
                positions[i] = positions[root + 1 + parents[node]] + 1
            if i - begin >= num_done[run]:
                place = cached[run] + i - begin
                nodes[0, at], nodes[1, at] = token, positions[i]
                nodes[2, at] = np.int64(table[run, place // page_size]) * page_size + place % page_size
                computed[at] = i
                if wants_logits[run] and i >= root:
                    logits_index[at_logits] = at
                    at_logits += 1
                at += 1
        if num_nodes[run]:
            width = num_nodes[run] + 1
            mask[mask_starts[run]] = True
            for node in range(1, width):
                row = mask_starts[run] + node * width
                parent = mask_starts[run] + (parents[at_node + node - 1] + 1) * width
                for column in range(node):
                    mask[row + column] = mask[parent + column]
                mask[row + node] = True
        at_known += num_known[run]
        at_node += num_nodes[run]
    return starts, mask_starts, nodes, computed, logits_index, positions, mask
