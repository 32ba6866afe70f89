"""Where the tokens that a pass computed for good lie in the KV pool, for all slots at once. Arithmetic over arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from pipeline.packing import Run
from pipeline.pages import block_table
from pipeline.proposal import Committed
from pipeline.slots import Slot


@dataclass(frozen=True, slots=True)
class Kept:
    """Of each of S runs its known tokens and the accepted nodes of its tree, side by side.

    Attributes:
        sources, targets: [m] int64 pool token indices of accepted nodes, and of where they belong behind their root;
            those in place are left out.
        begins: [S + 1] int64 where each run's tokens begin among the N of all.
        rows: [N] int64 each token's place in its run.
        positions: [N] int64 its place in the sequence.
        places: [N] int64 its pool token index, once moved.
    """

    sources: np.ndarray
    targets: np.ndarray
    begins: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    places: np.ndarray


def kept_of(runs: Sequence[Run], accepted: Sequence[np.ndarray], page_size: int) -> Kept:
    """What is kept of runs, one at least.

    Args:
        accepted: [A] of each run its tree's nodes that are kept, ascending.
    """
    return Kept(
        *_kept(
            block_table([run.pages for run in runs]),
            np.array([run.cached for run in runs], np.int64),
            np.array([len(run.known) for run in runs], np.int64),
            np.concatenate(accepted).astype(np.int64),
            np.array([len(nodes) for nodes in accepted], np.int64),
            page_size,
        )
    )


def followed(
    slots: Sequence[Slot], runs: Sequence[Run], kept: Kept, state_begin: Sequence[int]
) -> tuple[Committed, np.ndarray]:
    """What is kept of the slots that the drafter follows, and the rows of these tokens among the pass's states, [N].

    Args:
        state_begin: of each run, its first row among them.
    """
    counts = np.diff(kept.begins)
    is_followed = np.array([slot.is_followed for slot in slots])
    chosen = np.repeat(is_followed, counts)
    ends = [run.cached + count for run, count in zip(runs, counts.tolist(), strict=True)]
    tokens = [slot.known[run.cached : end] for slot, run, end in zip(slots, runs, ends, strict=True)]
    committed = Committed(
        slots=[slot.number for slot in slots if slot.is_followed],
        begins=np.concatenate([[0], np.cumsum(counts[is_followed])]),
        tokens=np.concatenate(tokens)[chosen],
        positions=kept.positions[chosen],
        places=kept.places[chosen],
    )
    return committed, (np.repeat(state_begin, counts) + kept.rows)[chosen]


@njit(cache=True, nogil=True)
def _place(pages: np.ndarray, position: int, page_size: int) -> Any:
    return np.int64(pages[position // page_size]) * page_size + position % page_size


@njit(cache=True, nogil=True)
def _kept(
    table: np.ndarray,
    cached: np.ndarray,
    num_known: np.ndarray,
    accepted: np.ndarray,
    num_accepted: np.ndarray,
    page_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    size = num_known.sum() + len(accepted)
    rows, positions, places = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    moves = np.empty((2, len(accepted)), np.int64)
    begins = np.zeros(len(cached) + 1, np.int64)
    at, node, num_moves = 0, 0, 0
    for run in range(len(cached)):
        pages, root_end = table[run], cached[run] + num_known[run]
        for i in range(num_known[run]):
            rows[at], positions[at] = i, cached[run] + i
            places[at] = _place(pages, positions[at], page_size)
            at += 1
        for i in range(num_accepted[run]):
            rows[at], positions[at] = num_known[run] + accepted[node], root_end + i
            places[at] = _place(pages, positions[at], page_size)
            if accepted[node] != i:
                moves[0, num_moves] = _place(pages, root_end + accepted[node], page_size)
                moves[1, num_moves] = places[at]
                num_moves += 1
            at += 1
            node += 1
        begins[run + 1] = at
    return moves[0, :num_moves], moves[1, :num_moves], begins, rows, positions, places
