"""A draft head's keys and values of committed tokens: noted every round, computed in bulk when they are wanted.

A round commits a few tokens of every slot, and writing their entries at once costs as much as drafting a level. Where
rounds do without a draft, most of that is never read; so entries wait until a draft is wanted, and are then computed
for all slots in one pass.
"""

from itertools import pairwise

import numpy as np
import torch

from pipeline.head import DraftHead
from pipeline.kv_cache import PagedCache
from pipeline.proposal import Committed

_MOST_WAITING = 512  # tokens; their states take 6 H bytes each in 16 bits
_NOTHING = -1  # in place of a row: nothing is known of the token before


class HeadEntries:
    """Entries in a cache that shares the target's pages.

    Args:
        cache: over the target's pages, and more.
        features: [num_slots or more, H]; the row of each slot will hold the feature of its newest token with an entry.
    """

    def __init__(self, head: DraftHead, cache: PagedCache, features: torch.Tensor) -> None:
        self._head = head
        self._cache = cache
        self._features = features
        self._known: set[int] = set()  # slots whose rows are set
        self._newest: dict[int, int] = {}  # by slot, the waiting row of its newest token
        self._carried: list[torch.Tensor] = []  # features that waiting rows refer to
        self._states: list[torch.Tensor] = []
        self._rows: list[np.ndarray] = []  # [n, 4] token, position, pool index, row of the token before
        self._num_waiting = 0

    def knows(self, slot: int) -> bool:
        """Whether anything of the slot has been committed."""
        return slot in self._newest or slot in self._known

    def release(self, slot: int) -> None:
        """The slot's next tokens belong to another request. What is waiting may be shared and still gets written."""
        self._known.discard(slot)
        self._newest.pop(slot, None)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Tokens were copied within the pool: pool token indices [n] -> [n]."""
        self.write()
        self._cache.move(source, target)

    def note(self, committed: Committed, states: torch.Tensor) -> None:
        """The target has computed these tokens for good.

        Args:
            states: [N, 3 H] of all tokens.
        """
        first, num_tokens = self._num_waiting, len(committed.tokens)
        before = np.arange(first - 1, first + num_tokens - 1)
        for slot, (begin, end) in zip(committed.slots, pairwise(committed.begins.tolist()), strict=True):
            before[begin] = self._row_before(slot)
            self._newest[slot] = first + end - 1
        self._rows.append(np.stack([committed.tokens, committed.positions, committed.places, before], axis=1))
        self._states.append(states)
        self._num_waiting += num_tokens
        if self._num_waiting >= _MOST_WAITING:
            self.write()

    def _row_before(self, slot: int) -> int:
        """Of a slot's next token: a waiting row, or from -2 down a carried feature."""
        if (newest := self._newest.get(slot)) is not None:
            return newest
        # Behind a prefix that another slot computed nothing is known of the token before: a loss of accuracy.
        if slot not in self._known:
            return _NOTHING
        self._carried.append(self._features[slot : slot + 1])  # changes when nothing waits any more
        return _NOTHING - len(self._carried)

    def write(self) -> None:
        """Computes the entries of all that is waiting."""
        if not self._num_waiting:
            return
        rows = np.concatenate(self._rows)
        fused = self._head.features(torch.cat(self._states))
        table = torch.cat([fused, *reversed(self._carried), fused.new_zeros(1, fused.shape[1])])  # -1 is its last row
        before = np.where(rows[:, 3] < 0, len(table) + rows[:, 3], rows[:, 3])
        index = torch.from_numpy(np.column_stack([rows[:, :3], before])).to(fused.device)
        tokens, positions, places, before_rows = index.unbind(1)
        _, key, value = self._head.heads(self._head.inputs(tokens, table[before_rows]), positions)
        # A released slot's pages may be another's by now: of entries for one place the newest counts.
        last = len(rows) - 1 - np.unique(rows[::-1, 2], return_index=True)[1]
        if len(last) < len(rows):
            kept = torch.from_numpy(last).to(fused.device)
            places, key, value = places[kept], key[kept], value[kept]
        self._cache.place(places)
        self._cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], 0)
        if self._newest:
            newest = torch.tensor([list(self._newest), list(self._newest.values())], device=fused.device)
            self._features.index_copy_(0, newest[0], fused[newest[1]])
        self._known |= self._newest.keys()
        self._newest.clear()
        for waiting in (self._carried, self._states, self._rows):
            waiting.clear()
        self._num_waiting = 0
