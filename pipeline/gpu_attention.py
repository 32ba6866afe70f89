"""Tree attention over the paged pool on a GPU: one Triton kernel for prefill chunks, chains and trees alike.

Each program attends for one tile of `pipeline.tiles` and one KV head, the query heads that share it folded into rows.
With few tiles the keys are split among programs and their parts joined after (flash decoding, Dao et al. 2023). Lengths
are read on the device: a captured graph serves any.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton's kernels are a language of their own, without types.

import torch
import triton
import triton.language as tl

from pipeline.tiles import BLOCK_ROWS, NUM_COLUMNS, Tiles

_PROGRAMS = 264  # enough to fill a large card; with fewer tiles keys are split
_MOST_SPLITS = 16
_BLOCKS = (64, 32, 16)  # keys of a step: the most of these that take no more than
_BLOCK_BYTES = 1 << 14  # so that steps under way fit the shared memory of small cards
_COLUMNS = tl.constexpr(NUM_COLUMNS)


def attend(
    query: torch.Tensor,  # [C, H, D]
    keys: torch.Tensor,  # [P, K, page, D]
    values: torch.Tensor,
    work: Tiles,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of every row of the tiles, [C, H, D]; 0 in rows of no tile."""
    num_rows, num_heads, head_dim = query.shape
    num_kv, page_size = keys.shape[1:3]
    query = query.contiguous()
    num_tiles = len(work.tiles)
    splits = 1
    while splits < _MOST_SPLITS and 2 * splits * num_tiles * num_kv <= _PROGRAMS:
        splits *= 2
    out = torch.zeros_like(query)  # a row of no tile must not be anything: some models mix rows to scale them
    parts = torch.zeros((splits, num_rows, num_heads, head_dim), dtype=torch.float32, device=query.device)
    sums = torch.zeros((splits, num_rows, num_heads, 2), dtype=torch.float32, device=query.device)
    fold = num_heads // num_kv
    padded, keys_size = triton.next_power_of_2(max(head_dim, 16)), keys.element_size()
    _attend[(num_tiles, num_kv, splits)](
        *(query, keys, values, out, parts, sums, work.tiles, work.pages, work.mask, work.positions),
        *(scale, sliding_window or 0, softcap or 1.0, num_rows),
        FOLD=fold,
        HEADS=num_heads,
        KV=num_kv,
        DIM=head_dim,
        PADDED=padded,
        PAGE=page_size,
        ROWS=max(BLOCK_ROWS, triton.next_power_of_2(fold)),
        BLOCK=next((keys for keys in _BLOCKS if keys * padded * keys_size <= _BLOCK_BYTES), _BLOCKS[-1]),
        SPLITS=splits,
        WINDOW=sliding_window is not None,
        CAP=softcap is not None,
    )
    if splits > 1:
        grid = (num_rows, num_heads)
        _join[grid](parts, sums, out, num_rows, HEADS=num_heads, DIM=head_dim, PADDED=padded, SPLITS=splits)
    return out


@triton.jit
def _attend(
    query,
    keys,
    values,
    out,
    parts,
    sums,
    tiles,
    pages,
    mask,
    positions,
    scale,
    window,
    softcap,
    num_rows,
    FOLD: tl.constexpr,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * _COLUMNS
    head, split = tl.program_id(1), tl.program_id(2)
    first, count, offset, cached = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    page_begin, mask_begin, length, at = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
    rows = tl.arange(0, ROWS)
    own, is_real = offset + rows // FOLD, rows // FOLD < count
    dims = tl.arange(0, PADDED)
    place = (first + rows // FOLD).to(tl.int64) * HEADS + head * FOLD + rows % FOLD  # of a query among all
    is_part = is_real[:, None] & (dims < DIM)[None, :]
    q = tl.load(query + place[:, None] * DIM + dims[None, :], mask=is_part, other=0.0)
    num_keys = cached + offset + count
    num_steps = (num_keys + BLOCK - 1) // BLOCK
    share = (num_steps + SPLITS - 1) // SPLITS
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, PADDED], tl.float32)
    own_position = tl.load(positions + at + own, mask=is_real, other=0)
    for step in range(split * share, tl.minimum((split + 1) * share, num_steps)):
        key_place = step * BLOCK + tl.arange(0, BLOCK)
        page = tl.load(pages + page_begin + key_place // PAGE, mask=key_place < num_keys, other=0).to(tl.int64)
        inner = key_place - cached  # place in the run
        lines = (page * KV + head) * PAGE + key_place % PAGE
        is_key = (key_place < num_keys)[:, None] & (dims < DIM)[None, :]
        k = tl.load(keys + lines[:, None] * DIM + dims[None, :], mask=is_key, other=0.0)
        scores = _scores(q, k, scale, softcap, CAP)
        visible = (key_place < num_keys)[None, :] & _inside(mask, mask_begin, length, inner, own, is_real)
        if WINDOW:
            visible = visible & _near(positions + at, length, key_place, inner, own_position, window)
        scores = tl.where(visible, scores, -1e30)
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.where(visible, tl.exp(scores - larger[:, None]), 0.0)
        shrink = tl.exp(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + lines[:, None] * DIM + dims[None, :], mask=is_key, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = larger
    if SPLITS == 1:
        mixed = mixed / total[:, None]
        tl.store(out + place[:, None] * DIM + dims[None, :], mixed.to(out.dtype.element_ty), mask=is_part)
    else:
        place += split.to(tl.int64) * num_rows * HEADS
        tl.store(parts + place[:, None] * DIM + dims[None, :], mixed, mask=is_part)
        _save_sums(sums + place * 2, largest, total, is_real)


@triton.jit
def _scores(q, k, scale, softcap, CAP: tl.constexpr):
    """[ROWS, keys] products of queries and keys."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAP:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # tanh
    return scores


@triton.jit
def _save_sums(sums, largest, total, is_real):
    """What `_join` needs of a part of the keys, [ROWS] each."""
    tl.store(sums, largest, mask=is_real)
    tl.store(sums + 1, total, mask=is_real)


@triton.jit
def _inside(mask, mask_begin, length, inner, own, is_real):
    """[ROWS, keys] whether rows at places `own` of the run see keys at places `inner`, negative for cached ones."""
    visible = inner[None, :] <= own[:, None]
    if mask_begin >= 0:
        is_inside = is_real[:, None] & (inner >= 0)[None, :] & (inner < length)[None, :]
        bits = tl.load(mask + mask_begin + own[:, None] * length + inner[None, :], mask=is_inside, other=0)
        visible = (inner < 0)[None, :] | (bits != 0)
    return visible


@triton.jit
def _near(positions, length, key_place, inner, own_position, window):
    """[ROWS, keys] whether keys are within the window before rows at positions `own_position`."""
    is_inside = (inner >= 0) & (inner < length)
    key_position = tl.where(inner < 0, key_place, tl.load(positions + inner, mask=is_inside, other=0))
    return own_position[:, None] - key_position[None, :] < window


@triton.jit
def _join(
    parts, sums, out, num_rows, HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr
):
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, PADDED)
    place = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    lines = place + splits.to(tl.int64) * num_rows * HEADS
    largest, total = tl.load(sums + lines * 2), tl.load(sums + lines * 2 + 1)
    weights = tl.exp(largest - tl.max(largest, 0))
    mixed = tl.load(parts + lines[:, None] * DIM + dims[None, :], mask=(dims < DIM)[None, :], other=0.0)
    joined = tl.sum(mixed * weights[:, None], 0) / tl.maximum(tl.sum(total * weights, 0), 1e-30)
    tl.store(out + place * DIM + dims, joined.to(out.dtype.element_ty), mask=dims < DIM)
