"""Which documents have been seen: their digests in an open-addressing table.

16 bytes a place and at most two of three places taken: 24 to 48 bytes a document, and half as much again while the
table doubles. A Python set of 16-byte strings takes about 100.
"""

import numpy as np
from numba import njit

_FIRST_PLACES = 1 << 10
_BATCH = 1 << 12


class DigestSet:
    """A set of 128-bit digests, which are random: their own bits choose their place."""

    def __init__(self) -> None:
        self._table = np.zeros((_FIRST_PLACES, 2), np.uint64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def num_bytes(self) -> int:
        """Memory of the table."""
        return self._table.nbytes

    def add(self, digest: bytes) -> bool:
        """Whether a digest of 16 bytes was not there yet."""
        return bool(self.add_all(np.frombuffer(digest, np.uint64).reshape(1, 2))[0])

    def add_all(self, digests: np.ndarray) -> np.ndarray:
        """Add in order.

        Args:
            digests: [n, 2] uint64.

        Returns:
            [n] bool, which were neither there yet nor are equal to an earlier one of them.
        """
        is_new = np.zeros(len(digests), np.bool_)
        # Bit by bit: room for all of them would be too much where most are there already.
        for begin in range(0, len(digests), _BATCH):
            batch = slice(begin, begin + _BATCH)
            self._reserve(self._count + len(digests[batch]))
            self._count += int(_add_all(self._table, digests[batch], is_new[batch]))
        return is_new

    def _reserve(self, count: int) -> None:
        places = len(self._table)
        while 3 * count > 2 * places:
            places *= 2
        if places > len(self._table):
            old = self._table[self._table.any(axis=1)]
            self._table = np.zeros((places, 2), np.uint64)
            _add_all(self._table, old, np.zeros(len(old), np.bool_))


@njit(cache=True, nogil=True)
def _add_all(table: np.ndarray, digests: np.ndarray, is_new: np.ndarray) -> int:
    # Two zero words mark a free place; no document is expected to have that digest.
    mask = np.uint64(len(table) - 1)
    added = 0
    for row in range(len(digests)):
        low, high = digests[row, 0], digests[row, 1]
        place = low & mask
        while table[place, 0] | table[place, 1]:
            if table[place, 0] == low and table[place, 1] == high:
                break
            place = (place + np.uint64(1)) & mask
        else:
            table[place, 0], table[place, 1] = low, high
            is_new[row] = True
            added += 1
    return added
