"""A packed row at fixed places on the device, padded to one of a few sizes, as captured graphs want it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from pipeline.graphs import SIZES, Fence, Staged, size_of
from pipeline.packing import Packed
from pipeline.tiles import NUM_COLUMNS, Tiles, rows_per_tile, tiles_of

_MOST = SIZES[-1]
_MOST_NODES = 16 * _MOST  # those computed before included
_MOST_PAGES = 1 << 17  # entries of all runs' block tables
_MOST_MASK = 1 << 20  # bytes of all trees' masks
_NOTHING = np.empty((0, 0), np.int64)


@dataclass(frozen=True, slots=True)
class Size:
    """What a graph is captured for: few sizes, for each takes a tenth of a second."""

    num_rows: int
    num_tiles: int
    num_logits: int


class StaticRow:
    """Takes one row after the other.

    Args:
        fold: query heads that share a KV head.
        trash: a pool token index that belongs to nobody; padding writes there.
        num_runs: most runs of a row.
        has_windows: whether attention asks for positions.
        fills: of further numbers that come with every row, what stands for them in padding.
    """

    def __init__(
        self,
        fold: int,
        trash: int,
        device: torch.device,
        num_runs: int,
        *,
        has_windows: bool,
        fills: Sequence[int] = (),
    ) -> None:
        self._rows_per_tile = rows_per_tile(fold)
        self._num_runs = num_runs
        self._has_windows = has_windows
        # Of token, position, write index, logits index and what is further.
        self._fills = np.array([0, 0, trash, 0, *fills])
        self._ids = Staged((len(self._fills) * _MOST,), torch.int64, device)
        self._tiles = Staged((_MOST, NUM_COLUMNS), torch.int32, device)
        self._pages = Staged((_MOST_PAGES,), torch.int32, device)
        self._positions = Staged((_MOST_NODES,), torch.int32, device)
        self._mask = Staged((_MOST_MASK,), torch.uint8, device)
        self._num_pages = 0
        self._read = Fence(device)

    def _size(self, num_rows: int, num_logits: int) -> Size:
        """The least size that holds so many rows."""
        rows = size_of(num_rows)
        tiles = min(rows, self._num_runs + rows // self._rows_per_tile)
        few = size_of(min(self._num_runs, _MOST))
        return Size(rows, tiles, few if num_logits <= few < rows else rows)

    def put(self, row: Packed, further: np.ndarray = _NOTHING) -> Size | None:
        """Makes a row the next one; None if there is no room for it.

        Args:
            further: [N, C] int64, a line for each of the further `fills`.
        """
        num_rows, num_logits = row.nodes.shape[1], len(row.logits_index)
        fits = num_rows <= _MOST and len(row.positions) <= _MOST_NODES and len(row.starts) - 1 <= self._num_runs
        if not fits or row.block_table.size > _MOST_PAGES or len(row.mask) > _MOST_MASK:
            return None
        self._read.wait()  # passes without logits end without waiting for the device
        size = self._size(num_rows, num_logits)
        tiles = tiles_of(row, self._rows_per_tile)
        lines = self._ids.host[: len(self._fills) * size.num_rows].reshape(-1, size.num_rows)
        _fill(lines, row.nodes, row.logits_index, further, self._fills, tiles, self._tiles.host[: size.num_tiles])
        pages = row.block_table.ravel()
        if len(pages) != self._num_pages or not np.array_equal(pages, self._pages.host[: len(pages)]):
            self._num_pages = len(pages)
            _send(self._pages, pages)
        if len(row.mask):
            _send(self._mask, row.mask)
        if self._has_windows:
            _send(self._positions, row.positions)
        return size

    def was_used(self) -> None:
        """A pass over the row is under way; the next `put` waits until the device has read it."""
        self._read.set()

    def fetch(self, size: Size) -> None:
        """Copies what `put` made to the device; the first step of what is captured."""
        self._ids.send(len(self._fills) * size.num_rows)
        self._tiles.send(size.num_tiles)

    def ids(self, size: Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, positions and write index, [rows] each, and logits index [rows with logits], int64."""
        token_ids, positions, write_index, logits_index = self._lines(size)[:4]
        return token_ids, positions, write_index, logits_index[: size.num_logits]

    def further(self, size: Size) -> torch.Tensor:
        """[further numbers, rows] int64."""
        return self._lines(size)[4:]

    def _lines(self, size: Size) -> torch.Tensor:
        return self._ids.device[: len(self._fills) * size.num_rows].view(-1, size.num_rows)

    def tiles(self, size: Size) -> Tiles:
        """Attention's work."""
        return Tiles(
            self._tiles.device[: size.num_tiles], self._pages.device, self._mask.device, self._positions.device
        )


def _send(staged: Staged, values: np.ndarray) -> None:
    staged.host[: len(values)] = values
    staged.send(len(values))


@njit(cache=True, nogil=True)
def _fill(
    lines: np.ndarray,
    nodes: np.ndarray,
    logits_index: np.ndarray,
    further: np.ndarray,
    fills: np.ndarray,
    tiles: np.ndarray,
    all_tiles: np.ndarray,
) -> None:
    """Writes what is put into the first columns of `lines` and rows of `all_tiles`, and padding behind it."""
    num_nodes, num_logits = nodes.shape[1], len(logits_index)
    for line in range(len(lines)):
        count = num_logits if line == 3 else num_nodes
        for i in range(count):
            if line == 3:
                lines[line, i] = logits_index[i]
            else:
                lines[line, i] = nodes[line, i] if line < 3 else further[line - 4, i]
        lines[line, count:] = fills[line]
    all_tiles[: len(tiles)] = tiles
    all_tiles[len(tiles) :] = 0
