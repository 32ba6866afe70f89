"""A packed row at fixed places on the device, padded to one of a few sizes, as captured graphs want it."""

import numpy as np
import torch

from pipeline.graphs import SIZES, Staged, size_of
from pipeline.packing import PackedRow
from pipeline.tiles import CAUSAL, MASK, NUM_COLUMNS, Tiles, rows_per_tile, tiles_of

Size = tuple[int, int, int]  # rows, tiles, rows with logits
_MOST = SIZES[-1]
_MOST_NODES = 16 * _MOST  # those computed before included
_MOST_PAGES = 1 << 17  # entries of all runs' block tables
_MOST_MASK = 1 << 20  # bytes of all trees' masks


class StaticRow:
    """Takes one row after the other.

    Args:
        fold: query heads that share a KV head.
        trash: a pool token index that belongs to nobody; padding writes there.
    """

    def __init__(self, fold: int, trash: int, device: torch.device) -> None:
        self._rows_per_tile = rows_per_tile(fold)
        self._trash = trash
        self._ids = Staged((4, _MOST), torch.int64, device)  # token, position, write index, logits index
        self._tiles = Staged((_MOST, NUM_COLUMNS), torch.int32, device)
        self._pages = Staged((_MOST_PAGES,), torch.int32, device)
        self._positions = Staged((_MOST_NODES,), torch.int32, device)
        self._mask = Staged((_MOST_MASK,), torch.uint8, device)

    def put(self, row: PackedRow) -> Size | None:
        """Puts a row, packed on the CPU, in its places; None if there is no room for it."""
        tiles = tiles_of(row, self._rows_per_tile)
        num_rows, num_logits = row.token_ids.shape[1], len(row.logits_index)
        fits = max(num_rows, len(tiles)) <= _MOST and len(row.positions) <= _MOST_NODES
        if not fits or row.block_table.size > _MOST_PAGES or len(row.mask) > _MOST_MASK:
            return None
        rows = size_of(num_rows)
        logits = size_of(max(num_logits, 1))
        size = rows, size_of(len(tiles)), rows if 2 * logits > rows else logits  # fewer sizes: most rounds want all
        ids = self._ids.host
        ids[:, :rows] = 0
        ids[2, :rows] = self._trash
        parts = (row.token_ids[0], row.position_ids[0], row.write_index, row.logits_index)
        for line, values in zip(ids, parts, strict=True):
            line[: len(values)] = values.numpy()
        self._ids.send()
        self._tiles.host[: size[1]] = 0
        _send(self._tiles, tiles, size[1])
        _send(self._pages, row.block_table.ravel())
        _send(self._positions, row.positions)
        if (tiles[:, MASK] != CAUSAL).any():
            _send(self._mask, row.mask)
        return size

    def ids(self, size: Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, positions and write index, [rows] each, and logits index [rows with logits], int64."""
        token_ids, positions, write_index, logits_index = self._ids.device[:, : size[0]]
        return token_ids, positions, write_index, logits_index[: size[2]]

    def tiles(self, size: Size) -> Tiles:
        """Attention's work."""
        return Tiles(self._tiles.device[: size[1]], self._pages.device, self._mask.device, self._positions.device)


def _send(staged: Staged, values: np.ndarray, count: int | None = None) -> None:
    staged.host[: len(values)] = values
    staged.send(len(values) if count is None else count)
