"""A packed row cut into tiles, a few rows of one run each, as a GPU kernel wants its work. Arithmetic over arrays.

A tile's rows see the run's cached tokens and, inside the run, what the tree mask or causality lets them see. All that a
tile needs to know is in integers on the device, so one captured graph serves rounds of any lengths.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from pipeline.packing import Packed

# Columns of a tile.
FIRST, COUNT, OFFSET, CACHED, PAGES, MASK, LENGTH, POSITIONS = range(8)
NUM_COLUMNS = 8
CAUSAL = -1
BLOCK_ROWS = 32  # query rows of a tile at most: its rows x query heads of a KV head


@dataclass(frozen=True, slots=True)
class Tiles:
    """Attention's work.

    Attributes:
        tiles: [W, 8] int32. Of each tile: its first row among those computed; how many rows, 0 in padding; place of
            its first row in the run; tokens cached before the run; where the run's pages begin in `pages`; where its
            mask begins in `mask`, `CAUSAL` for chains; the run's length; where its positions begin in `positions`.
        pages: int32 the pages of all runs.
        mask: uint8 the visibility of all trees, row by row.
        positions: int32 of all nodes, those not computed included.
    """

    tiles: torch.Tensor
    pages: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


def rows_per_tile(fold: int) -> int:
    """Rows of a run in one tile.

    Args:
        fold: query heads that share a KV head.
    """
    return max(BLOCK_ROWS // fold, 1)


def tiles_of(row: Packed, num_rows: int) -> np.ndarray:
    """The tiles of a packed row, `num_rows` rows each at most, [W, 8] int32.

    They refer to its flattened `block_table`, its `mask` and its `positions`.
    """
    tiles: np.ndarray = cut(row.starts, row.num_done, row.cached, row.mask_starts, row.block_table.shape[1], num_rows)
    return tiles


@njit(cache=True, nogil=True)
def cut(
    starts: np.ndarray,
    num_done: np.ndarray,
    cached: np.ndarray,
    mask_starts: np.ndarray,
    num_pages: int,
    num_rows: int,
) -> np.ndarray:
    """`tiles_of` a packed row's columns, of which each run has `num_pages` pages."""
    num_tiles = 0
    for run in range(len(cached)):
        num_tiles += -(-(starts[run + 1] - starts[run] - num_done[run]) // num_rows)
    tiles = np.empty((num_tiles, NUM_COLUMNS), np.int32)
    at, first = 0, 0
    for run in range(len(cached)):
        length = starts[run + 1] - starts[run]
        for offset in range(num_done[run], length, num_rows):
            count = min(num_rows, length - offset)
            tiles[at, FIRST], tiles[at, COUNT], tiles[at, OFFSET] = first, count, offset
            tiles[at, CACHED], tiles[at, PAGES], tiles[at, MASK] = cached[run], run * num_pages, mask_starts[run]
            tiles[at, LENGTH], tiles[at, POSITIONS] = length, starts[run]
            at += 1
            first += count
    return tiles


def tiles_on(row: Packed, num_rows: int, device: torch.device) -> Tiles:
    """The same with what it refers to, on a device."""
    arrays = (tiles_of(row, num_rows), row.block_table.ravel(), row.mask.view(np.uint8), row.positions)
    tiles, pages, mask, positions = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)
    return Tiles(tiles, pages, mask, positions)


def attend_by_tile(
    query: torch.Tensor,  # [C, H, D]
    keys: torch.Tensor,  # [P, K, page, D]
    values: torch.Tensor,
    work: Tiles,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """What a kernel over tiles computes, [C, H, D], tile by tile in plain torch: the reference, and slow."""
    out = torch.zeros_like(query)
    page_size, fold = keys.shape[2], query.shape[1] // keys.shape[1]
    for tile in work.tiles.tolist():
        first, count, offset, cached, begin, mask_begin, length, at = tile
        if not count:
            continue
        num_keys = cached + offset + count
        pages = work.pages[begin : begin + -(-num_keys // page_size)].long()
        k, v = (pool[pages].transpose(0, 1).flatten(1, 2)[:, :num_keys].float() for pool in (keys, values))
        own = torch.arange(offset, offset + count, device=query.device)[:, None]
        place = torch.arange(num_keys, device=query.device)[None] - cached
        inside = place <= own
        if mask_begin != CAUSAL:
            index = mask_begin + own * length + place.clamp(min=0)
            inside = work.mask[index.clamp(max=len(work.mask) - 1)] > 0
        visible = (place < 0) | inside
        if sliding_window is not None:
            known = place.clamp(min=0)[0] + at
            where = torch.where(place[0] < 0, place[0] + cached, work.positions[known])
            visible &= work.positions[at + own[:, 0]][:, None] - where[None] < sliding_window
        q = query[first : first + count].float().reshape(count, keys.shape[1], fold, -1)  # [N, K, fold, D]
        scores = torch.einsum("nkfd,kld->knfl", q, k) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = scores.masked_fill(~visible[None, :, None], -torch.inf).softmax(-1)
        mixed = torch.einsum("knfl,kld->nkfd", weights, v).flatten(1, 2)
        out[first : first + count] = mixed.to(out.dtype)
    return out
