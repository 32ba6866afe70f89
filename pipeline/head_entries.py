"""A draft head's keys and values of committed tokens: noted every round, computed in bulk when they are wanted.

A round commits a few tokens of every slot, and writing their entries at once costs as much as drafting a level. Where
rounds do without a draft, most of that is never read; so entries wait until a draft is wanted, and are then computed
for all slots in one pass, captured in fixed sizes as drafting's are.
"""

from typing import Any

import numpy as np
import torch
from numba import njit

from pipeline.graphs import SIZES, Fence, Graphs, Staged, size_of
from pipeline.head import NUM_DEPTHS, DraftHead
from pipeline.kv_cache import PagedCache
from pipeline.proposal import Committed

_MOST_WAITING = 512  # tokens; their states take 6 H bytes each in 16 bits
_NOTHING = -1  # in place of a row: nothing is known of the token before
# Lines of what is computed for each token; of what is kept for each slot.
_TOKEN, _POSITION, _PLACE, _BEFORE = range(4)
_SLOT, _NEWEST = range(2)


class HeadEntries:
    """Entries in a cache that shares the target's pages.

    Args:
        cache: over the target's pages, and more; the last belongs to nobody.
        features: [R + 2, H]; the row of each slot will hold the feature of its newest token with an entry. The last row
            but one is zero, and the last is nobody's.
        num_slots: the first rows are theirs.
        is_static: compute in passes of fixed sizes.
    """

    def __init__(
        self, head: DraftHead, cache: PagedCache, features: torch.Tensor, num_slots: int, *, is_static: bool
    ) -> None:
        self._head = head
        self._cache = cache
        self._features = features
        self._num_slots = num_slots
        self._known = np.zeros(num_slots, np.bool_)  # slots whose rows are set
        self._newest = np.full(num_slots, _NOTHING)  # by slot, the waiting row of its newest token
        self._states: list[torch.Tensor] = []
        # [4, n], lines as above; of the token before a waiting row, or from -2 down a slot.
        self._rows: list[np.ndarray] = []
        self._num_waiting = 0
        self._static = _Static(self._compute, features, num_slots) if is_static else None

    def knows(self, slot: int) -> bool:
        """Whether anything of the slot has been committed."""
        return bool(self._known[slot] or self._newest[slot] != _NOTHING)

    def release(self, slot: int) -> None:
        """The slot's next tokens belong to another request. What is waiting may be shared and still gets written."""
        self._known[slot], self._newest[slot] = False, _NOTHING

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Tokens were copied within the pool: pool token indices [n] -> [n]."""
        self.write()
        self._cache.move(source, target)

    def note(self, committed: Committed, states: torch.Tensor) -> None:
        """The target has computed these tokens for good.

        Args:
            states: [N, 3 H] of all tokens.
        """
        slots = np.array(committed.slots, np.int64)
        columns = (committed.tokens, committed.positions, committed.places, committed.begins)
        self._rows.append(_noted(*columns, slots, self._known, self._newest, self._num_waiting))
        self._states.append(states)
        self._num_waiting += len(committed.tokens)
        if self._num_waiting >= _MOST_WAITING:
            self.write()

    def write(self) -> None:
        """Computes the entries of all that is waiting."""
        if not self._num_waiting:
            return
        rows = self._rows[0] if len(self._rows) == 1 else np.concatenate(self._rows, axis=1)
        if len(self._rows) > 1:
            # A released slot's pages may be another's by now: of entries for one place the newest counts.
            is_older = np.ones(rows.shape[1], np.bool_)
            is_older[rows.shape[1] - 1 - np.unique(rows[_PLACE, ::-1], return_index=True)[1]] = False
            rows[_PLACE, is_older] = self._cache.last_page
        slots = np.flatnonzero(self._newest != _NOTHING)
        newest = np.stack([slots, self._newest[slots]])
        if self._static is None or not self._static.run(rows, newest, self._states, self._cache.last_page):
            device = self._features.device
            index = torch.from_numpy(_numbered(rows, np.empty_like(rows), self._num_slots, self._cache.last_page))
            of_slots, newest_rows = self._features[: self._num_slots], torch.from_numpy(newest).to(device)
            self._compute(index.to(device), newest_rows, torch.cat(self._states), of_slots)
        self._known[slots] = True
        self._newest[:] = _NOTHING
        self._states.clear()
        self._rows.clear()
        self._num_waiting = 0

    def _compute(self, rows: torch.Tensor, newest: torch.Tensor, states: torch.Tensor, of_slots: torch.Tensor) -> None:
        """Writes entries, and the features of newest tokens.

        Args:
            rows: [4, n] int64; newest: [2, m] int64.
            states: [n, 3 H]; of_slots: [num_slots, H] the slots' features as they were before.
        """
        fused = self._head.features(states)
        table = torch.cat([fused, of_slots, self._features[-2:-1]])
        inputs = self._head.inputs(rows[_TOKEN], table[rows[_BEFORE]])
        key, value = self._head.entries(inputs, rows[_POSITION])
        self._cache.place(rows[_PLACE])
        self._cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], 0)
        self._features.index_copy_(0, newest[_SLOT], fused[newest[_NEWEST]])


class _Static:
    """The same in passes of fixed sizes, padded. A capture runs a pass several times, so none reads what it writes.

    Args:
        compute: of `HeadEntries`.
    """

    def __init__(self, compute: Any, features: torch.Tensor, num_slots: int) -> None:
        device, most = features.device, SIZES[-1]
        self._compute = compute
        self._num_slots = num_slots
        self._features = features[:num_slots]
        self._before = torch.zeros_like(self._features)
        self._nobodys = len(features) - 1
        self._rows = Staged((4 * most,), torch.int64, device)
        self._newest = Staged((2 * num_slots,), torch.int64, device)
        self._states = features.new_zeros(most, NUM_DEPTHS * features.shape[1])
        self._graphs: Graphs[int, bool] = Graphs(self._pass, device)
        self._read = Fence(device)

    def run(self, rows: np.ndarray, newest: np.ndarray, states: list[torch.Tensor], trash: int) -> bool:
        """Whether there was room for it, and it could be captured.

        Args:
            trash: a pool token index that belongs to nobody.
        """
        count, num_newest = rows.shape[1], newest.shape[1]
        if count > SIZES[-1]:
            return False
        self._read.wait()
        size = size_of(count)
        _numbered(rows, self._rows.host[: 4 * size].reshape(4, size), self._num_slots, trash)
        kept = self._newest.host.reshape(2, -1)
        kept[:, :num_newest] = newest
        kept[:, num_newest:] = np.array([[self._nobodys], [0]])
        torch.cat(states, out=self._states[:count])
        self._before.copy_(self._features)
        was_computed = self._graphs(size) is not None
        if not was_computed:
            self._features.copy_(self._before)
        self._read.set()
        return was_computed

    def _pass(self, size: int) -> bool:
        self._rows.send(4 * size)
        self._newest.send()
        rows = self._rows.device[: 4 * size].view(4, size)
        self._compute(rows, self._newest.device.view(2, -1), self._states[:size], self._before)
        return True


@njit(cache=True, nogil=True)
def _noted(
    tokens: np.ndarray,
    positions: np.ndarray,
    places: np.ndarray,
    begins: np.ndarray,
    slots: np.ndarray,
    known: np.ndarray,
    newest: np.ndarray,
    first: int,
) -> np.ndarray:
    """[4, n] int64 rows of new tokens, the first of which is number `first`; `newest` changes with them.

    Behind a prefix that another slot computed nothing is known of the token before: a loss of accuracy. Rows of slots
    change when nothing waits any more.
    """
    rows = np.empty((4, len(tokens)), np.int64)
    rows[_TOKEN], rows[_POSITION], rows[_PLACE] = tokens, positions, places
    for i, slot in enumerate(slots):
        before = newest[slot]
        if before == _NOTHING and known[slot]:
            before = _NOTHING - 1 - slot
        for row in range(begins[i], begins[i + 1]):
            rows[_BEFORE, row] = before
            before = first + row
        newest[slot] = before
    return rows


@njit(cache=True, nogil=True)
def _numbered(rows: np.ndarray, lines: np.ndarray, num_slots: int, trash: int) -> np.ndarray:
    """Writes rows into `lines`, [4, m], and padding behind them; of the token before, its number in a table.

    The table: m features of waiting tokens, those of the slots, and zero.
    """
    count, zero = rows.shape[1], lines.shape[1] + num_slots
    lines[:, :count] = rows
    for i in range(count):
        if rows[_BEFORE, i] < 0:
            slot = _NOTHING - 1 - rows[_BEFORE, i]
            lines[_BEFORE, i] = zero if slot < 0 else lines.shape[1] + slot
    lines[:, count:] = 0
    lines[_PLACE, count:], lines[_BEFORE, count:] = trash, zero
    return lines
