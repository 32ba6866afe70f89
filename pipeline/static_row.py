"""A packed row at fixed places on the device, padded to one of a few sizes, as captured graphs want it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit

from pipeline.graphs import SIZES, Fence, Staged
from pipeline.packing import Runs, packed
from pipeline.tiles import NUM_COLUMNS, Tiles, cut, rows_per_tile

_MOST = SIZES[-1]
_MOST_NODES = 16 * _MOST  # those computed before included
_MOST_PAGES = 1 << 17  # entries of all runs' block tables
_MOST_MASK = 1 << 20  # bytes of all trees' masks
_NOTHING = np.empty((0, 0), np.int64)
_SIZES = np.array(SIZES)
_LOGITS = 3  # line of the logits index, behind token, position and write index


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
        self._read = Fence(device)

    def put(self, runs: Runs, page_size: int, further: np.ndarray = _NOTHING) -> Size | None:
        """Makes these runs the next row; None if there is no room for them.

        Args:
            further: [N, C] int64, a line for each of the further `fills`.
        """
        if len(runs) > self._num_runs or runs.block_table.size > _MOST_PAGES:
            return None
        self._read.wait()  # passes without logits end without waiting for the device
        staged: Any = (self._ids.host, self._tiles.host, self._pages.host, self._positions.host, self._mask.host)
        shape: Any = (further, self._fills, _SIZES, self._num_runs, self._rows_per_tile)
        rows, tiles, logits, num_positions, mask_size, has_pages = _put(*runs.columns(page_size), *shape, *staged)
        if not rows:
            return None
        if has_pages:
            self._pages.send(runs.block_table.size)
        if mask_size:
            self._mask.send(mask_size)
        if self._has_windows:
            self._positions.send(num_positions)
        return Size(rows, tiles, logits)

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


@njit(cache=True, nogil=True)
def _put(
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
    further: np.ndarray,
    fills: np.ndarray,
    sizes: np.ndarray,
    num_runs: int,
    rows_per_tile: int,
    ids: np.ndarray,
    all_tiles: np.ndarray,
    pages: np.ndarray,
    all_positions: np.ndarray,
    all_mask: np.ndarray,
) -> tuple[int, int, int, int, int, bool]:
    """Packs runs and writes what is put, padded, to where it is sent from.

    Returns:
        The size's rows, tiles and rows with logits, all 0 if there is no room; how many positions and bytes of masks
        there are; whether the pages are others than before.
    """
    starts, mask_starts, nodes, _, logits_index, positions, mask = packed(
        known, tokens, parents, num_known, num_nodes, num_done, cached, wants_logits, table, page_size
    )
    num_nodes_computed, num_logits = nodes.shape[1], len(logits_index)
    fits = num_nodes_computed <= sizes[-1] and len(positions) <= len(all_positions) and len(mask) <= len(all_mask)
    if not fits:
        return 0, 0, 0, 0, 0, False
    rows = sizes[np.searchsorted(sizes, num_nodes_computed)]
    few = sizes[np.searchsorted(sizes, min(num_runs, sizes[-1]))]
    num_tiles = min(rows, num_runs + rows // rows_per_tile)
    tiles = cut(starts, num_done, cached, mask_starts, table.shape[1], rows_per_tile)
    all_tiles[: len(tiles)] = tiles
    all_tiles[len(tiles) : num_tiles] = 0
    lines = ids[: len(fills) * rows].reshape(-1, rows)
    for line in range(len(fills)):
        count = num_logits if line == _LOGITS else num_nodes_computed
        for i in range(count):
            if line == _LOGITS:
                lines[line, i] = logits_index[i]
            else:
                lines[line, i] = nodes[line, i] if line < _LOGITS else further[line - _LOGITS - 1, i]
        lines[line, count:] = fills[line]
    all_positions[: len(positions)] = positions
    all_mask[: len(mask)] = mask
    has_pages = False
    for run in range(len(table)):
        for i in range(table.shape[1]):
            place = run * table.shape[1] + i
            has_pages |= pages[place] != table[run, i]
            pages[place] = table[run, i]
    return rows, num_tiles, few if num_logits <= few < rows else rows, len(positions), len(mask), has_pages
