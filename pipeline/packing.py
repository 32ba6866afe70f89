"""One round's work as one packed row [1, T]: every slot's run of known tokens and tree nodes, side by side.

Linear layers see no padding. Positions, cache places and visibility are per node, so a slot may bring one node, a
tree of 60 or a prefill chunk of 500. Pure arithmetic over arrays; no slot state.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.pages import PageRun, block_table, pool_index
from pipeline.tree import TokenTree, ancestor_mask, node_depths

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

    @property
    def num_logits(self) -> int:
        """Rows of logits it gets: the root's if that is computed, and those of the tree nodes that are."""
        return len(self) - max(self.num_done, len(self.known) - 1) if self.wants_logits else 0


@dataclass(frozen=True, slots=True)
class PackedRow:
    """All runs of a round as arrays.

    Attributes:
        token_ids, position_ids: [1, C] int64 tensors on the model's device, of the C <= T nodes that are computed.
        write_index: [C] int64 tensor, pool token index (page * page_size + offset) of each one's key and value.
        logits_index: [M] int64 tensor, which of the C need logits, in order.
        computed: [C] int64 tensor, their places among the T nodes; None if these are all.
        starts: [S + 1] int32, the range of each run.
        cached: [S] int32, tokens in the cache before each run.
        block_table: [S, B] int32.
        positions: [T] int32.
        mask, mask_starts: visibility inside tree runs, see `pipeline.cpu_attention.AttentionBatch`.
        page_size: tokens a page.
        num_short: the first `num_short` runs are trees or short chains, the others long chains (prefill chunks).
        scratch: what attention derives from the row once for all layers.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    write_index: torch.Tensor
    logits_index: torch.Tensor
    computed: torch.Tensor | None
    starts: np.ndarray
    cached: np.ndarray
    block_table: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    mask_starts: np.ndarray
    page_size: int
    num_short: int
    scratch: dict[object, object] = field(default_factory=dict)


def order_runs(runs: Sequence[Run], long_chain: int) -> tuple[list[int], int]:
    """Order in which runs are packed: short ones first. Returns indices and the number of short runs."""
    long = [i for i, run in enumerate(runs) if len(run) >= long_chain and len(run.tree) == 0]
    chosen = set(long)
    short = [i for i in range(len(runs)) if i not in chosen]
    return short + long, len(short)


def pack(runs: Sequence[Run], num_short: int, page_size: int, device: torch.device) -> PackedRow:
    """Packs runs, already ordered short first, into one row."""
    lengths = np.array([len(run) for run in runs], np.int64)
    starts = np.zeros(len(runs) + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    total = int(starts[-1])
    token_ids, positions = np.empty(total, np.int64), np.empty(total, np.int32)
    write_index = np.empty(total, np.int64)
    masks: list[np.ndarray] = []
    mask_starts = np.full(len(runs), _NO_MASK, np.int64)
    mask_size = 0
    is_computed = np.ones(total, np.bool_)
    has_logits = np.zeros(total, np.bool_)
    for i, run in enumerate(runs):
        begin, num_known = starts[i], len(run.known)
        root = begin + num_known - 1
        token_ids[begin : root + 1] = run.known
        token_ids[root + 1 : starts[i + 1]] = run.tree.tokens
        positions[begin : root + 1] = np.arange(run.cached, run.cached + num_known)
        index = np.arange(run.cached, run.cached + len(run))
        write_index[begin : starts[i + 1]] = pool_index(run.pages, index, page_size)
        if len(run.tree):
            positions[root + 1 : starts[i + 1]] = run.cached + num_known - 1 + node_depths(run.tree.parents)
            mask_starts[i] = mask_size
            masks.append(ancestor_mask(run.tree.parents).ravel())
            mask_size += masks[-1].size
        is_computed[begin : begin + run.num_done] = False
        has_logits[root : starts[i + 1]] = run.wants_logits
    computed = np.flatnonzero(is_computed)
    return PackedRow(
        token_ids=torch.from_numpy(token_ids[computed])[None].to(device),
        position_ids=torch.from_numpy(positions[computed].astype(np.int64))[None].to(device),
        write_index=torch.from_numpy(write_index[computed]).to(device),
        logits_index=torch.from_numpy(np.flatnonzero(has_logits[computed])).to(device),
        computed=None if len(computed) == total else torch.from_numpy(computed).to(device),
        starts=starts,
        cached=np.array([run.cached for run in runs], np.int32),
        block_table=block_table([run.pages for run in runs]),
        positions=positions,
        mask=np.concatenate(masks) if masks else np.empty(0, np.bool_),
        mask_starts=mask_starts,
        page_size=page_size,
        num_short=num_short,
    )
