"""Where the tokens that a pass computed for good lie in the KV pool, for all slots at once. Arithmetic over arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from pipeline.packing import Runs
from pipeline.proposal import Committed
from pipeline.slots import Slot


@dataclass(frozen=True, slots=True)
class Kept:
    """Of each of S runs its known tokens and the accepted nodes of its tree, side by side.

    Attributes:
        sources, targets: [m] int64 pool token indices of accepted nodes, and of where they belong behind their root;
            those in place are left out.
        begins: [S + 1] int64 where each run's tokens begin among the N of all.
        tokens: [N] int32.
        rows: [N] int64 each token's place in its run.
        positions: [N] int64 its place in the sequence.
        places: [N] int64 its pool token index, once moved.
    """

    sources: np.ndarray
    targets: np.ndarray
    begins: np.ndarray
    tokens: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    places: np.ndarray


def kept_of(runs: Runs, accepted: np.ndarray, begins: np.ndarray, page_size: int) -> Kept:
    """What is kept of runs, one at least.

    Args:
        accepted: [A] int32 the nodes of all trees that are kept, ascending within each.
        begins: [S + 1] int64 where each run's begin.
    """
    columns = (runs.known, runs.tokens, runs.num_known, runs.num_nodes, runs.cached, runs.block_table)
    return Kept(*_kept(*columns, accepted, begins, page_size))


def followed(slots: Sequence[Slot], kept: Kept, state_begin: np.ndarray) -> tuple[Committed, np.ndarray]:
    """What is kept of the slots that the drafter follows, and the rows of these tokens among the pass's states, [N].

    Args:
        state_begin: [S] of each run, its first row among them.
    """
    counts = np.diff(kept.begins)
    rows = np.repeat(state_begin, counts) + kept.rows
    is_followed = np.array([slot.is_followed for slot in slots])
    if is_followed.all():
        numbers = [slot.number for slot in slots]
        return Committed(numbers, kept.begins, kept.tokens, kept.positions, kept.places), rows
    chosen = np.repeat(is_followed, counts)
    committed = Committed(
        slots=[slot.number for slot in slots if slot.is_followed],
        begins=np.concatenate([[0], np.cumsum(counts[is_followed])]),
        tokens=kept.tokens[chosen],
        positions=kept.positions[chosen],
        places=kept.places[chosen],
    )
    return committed, rows[chosen]


@njit(cache=True, nogil=True)
def _place(pages: np.ndarray, position: int, page_size: int) -> Any:
    return np.int64(pages[position // page_size]) * page_size + position % page_size


@njit(cache=True, nogil=True)
def _kept(
    known: np.ndarray,
    tree_tokens: np.ndarray,
    num_known: np.ndarray,
    num_nodes: np.ndarray,
    cached: np.ndarray,
    table: np.ndarray,
    accepted: np.ndarray,
    accepted_begins: np.ndarray,
    page_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    size = len(known) + len(accepted)
    tokens, rows = np.empty(size, np.int32), np.empty(size, np.int64)
    positions, places = np.empty(size, np.int64), np.empty(size, np.int64)
    moves = np.empty((2, len(accepted)), np.int64)
    begins = np.zeros(len(cached) + 1, np.int64)
    at, at_known, at_node, num_moves = 0, 0, 0, 0
    for run in range(len(cached)):
        pages, root_end = table[run], np.int64(cached[run]) + num_known[run]
        for i in range(num_known[run]):
            tokens[at], rows[at], positions[at] = known[at_known + i], i, cached[run] + i
            places[at] = _place(pages, positions[at], page_size)
            at += 1
        own = accepted[accepted_begins[run] : accepted_begins[run + 1]]
        for i, node in enumerate(own):
            tokens[at], rows[at], positions[at] = tree_tokens[at_node + node], num_known[run] + node, root_end + i
            places[at] = _place(pages, positions[at], page_size)
            if node != i:
                moves[0, num_moves] = _place(pages, root_end + node, page_size)
                moves[1, num_moves] = places[at]
                num_moves += 1
            at += 1
        begins[run + 1] = at
        at_known += num_known[run]
        at_node += num_nodes[run]
    return moves[0, :num_moves], moves[1, :num_moves], begins, tokens, rows, positions, places
