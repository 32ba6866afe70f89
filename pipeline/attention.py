"""Tree attention over the paged KV pool, registered with transformers as the attention implementation `rasd`.

Three ways to compute the same thing: the numba kernel of `pipeline.cpu_attention`, exactly ragged, for trees and short
chains on a CPU; the Triton kernel of `pipeline.gpu_attention` for everything on a GPU; and torch's sdpa over gathered
pages, for prefill chunks on a CPU and wherever a kernel lacks something.
"""

import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as cached

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from pipeline import cpu_attention
from pipeline.errors import ModelError
from pipeline.graphs import has_compiler
from pipeline.kv_cache import PagedCache
from pipeline.packing import Packed, PackedRow
from pipeline.tiles import CAUSAL, Tiles, attend_by_tile, rows_per_tile, tiles_on

IMPLEMENTATION = "rasd"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What the attention function needs beyond its tensors; travels as the model's keyword argument `packed`.

    Attributes:
        row: what is computed; may lack if `tiles` say it.
        tiles: the same as a kernel's work, where it must lie at fixed places.
    """

    row: PackedRow | None
    cache: PagedCache
    tiles: Tiles | None = None


def rasd_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, C, D]
    key: torch.Tensor,  # [1, K, C, D], already in the cache
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: AttentionContext,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer for a packed row, [1, C, H, D]; the signature is transformers' `AttentionInterface`."""
    if s_aux is not None:
        raise ModelError(
            f"{type(module).__name__} uses attention sinks, which are not supported; choose another target."
        )
    row, cache = packed.row, packed.cache
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = cache.keys[layer], cache.values[layer]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q = query[0].transpose(0, 1)  # [C, H, D]
    tiles = packed.tiles
    if tiles is None and row is not None and _gpu_kernel(q.device.type) is not None:
        tiles = _tiles(row, q.shape[1] // keys.shape[1], q.device)
    if tiles is not None:
        return _attend_tiles(q, keys, values, tiles, scale, sliding_window, softcap)[None], None
    assert row is not None
    computed = None if row.computed is None else row.computed.to(q.device)
    if computed is not None:  # nodes done before ask nothing, but stand in the masks
        q = q.new_zeros((len(row.arrays.positions), *q.shape[1:])).index_copy_(0, computed, q)  # [T, H, D]
    num_runs = len(row.arrays.cached)
    num_short = row.arrays.num_short if cpu_attention.is_available() and _has_kernel(q) else 0
    parts: list[torch.Tensor] = []
    if num_short:
        batch = _kernel_batch(row)
        rows = q[: row.arrays.starts[num_short]]
        parts.append(
            cpu_attention.attend(rows, keys, values, batch, scale=scale, sliding_window=sliding_window, softcap=softcap)
        )
    elif row.arrays.num_short:
        parts.append(_gathered(q, keys, values, row, (0, row.arrays.num_short), scale, sliding_window, softcap))
    for i in range(row.arrays.num_short, num_runs):
        parts.append(_gathered(q, keys, values, row, (i, i + 1), scale, sliding_window, softcap))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (out if computed is None else out[computed])[None], None


AttentionInterface.register(IMPLEMENTATION, rasd_attention)


@cached
def _gpu_kernel(device_type: str) -> Callable[..., torch.Tensor] | None:
    """The Triton kernel, where it can run."""
    if device_type != "cuda" or not has_compiler():
        return None
    try:
        from triton.errors import TritonError

        from pipeline.gpu_attention import attend

        try:
            attend(*_probe(torch.device("cuda")), scale=1.0)
        except TritonError as error:
            raise RuntimeError(error) from error
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        # No Triton, no headers, or a card that it does not know: slower, but it works.
        log.warning("attention goes without its GPU kernel and will be slower: %s", error)
        return None
    return attend


def _probe(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Tiles]:
    """The least that a kernel can be asked: query, keys, values, and one tile."""
    pool = torch.zeros(1, 1, 16, 16, device=device)
    numbers = torch.zeros(1, dtype=torch.int32, device=device)
    tiles = torch.tensor([[0, 1, 0, 0, 0, CAUSAL, 1, 0]], dtype=torch.int32, device=device)
    return pool[:, 0, :1], pool, pool, Tiles(tiles, numbers, numbers.to(torch.uint8), numbers)


def can_be_static(device: torch.device) -> bool:
    """Whether attention over `Tiles` is fast on a device that can capture, or works at all on another."""
    return device.type != "cuda" or _gpu_kernel(device.type) is not None


def _attend_tiles(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: Tiles,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    kernel = _gpu_kernel(q.device.type)
    if kernel is not None:
        with torch.cuda.device(q.device):  # of a split model, not the one that is current
            return kernel(q, keys, values, tiles, scale=scale, sliding_window=window, softcap=softcap)
    return attend_by_tile(q, keys, values, tiles, scale=scale, sliding_window=window, softcap=softcap)


def _tiles(row: PackedRow, fold: int, device: torch.device) -> Tiles:
    tiles = row.scratch.get(("tiles", device))
    if not isinstance(tiles, Tiles):
        tiles = row.scratch["tiles", device] = tiles_on(row.arrays, rows_per_tile(fold), device)
    return tiles


def _has_kernel(query: torch.Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16)


def _kernel_batch(row: PackedRow) -> cpu_attention.AttentionBatch:
    batch = row.scratch.get("kernel")
    if not isinstance(batch, cpu_attention.AttentionBatch):
        n = row.arrays.num_short
        batch = cpu_attention.AttentionBatch(
            starts=row.arrays.starts[: n + 1],
            cached=row.arrays.cached[:n],
            block_table=row.arrays.block_table[:n],
            positions=row.arrays.positions[: row.arrays.starts[n]],
            mask=row.arrays.mask,
            mask_starts=row.arrays.mask_starts[:n],
        )
        row.scratch["kernel"] = batch
    return batch


@dataclass(frozen=True, slots=True)
class _Group:
    """Runs computed together, padded to the longest; derived once a round.

    Attributes:
        pages: [S, B] int64 pages to gather.
        num_keys: longest cached + run length.
        query_index: [S, N] int64 packed rows, padding repeats the run's first node.
        output_index: [T of the group] int64 places of the real nodes in the flattened [S * N].
        visible: [S, 1, N, num_keys] bool, or None where causal attention from position 0 says the same.
    """

    pages: torch.Tensor
    num_keys: int
    query_index: torch.Tensor
    output_index: torch.Tensor
    visible: torch.Tensor | None


def _group(row: PackedRow, span: tuple[int, int], window: int | None, device: torch.device) -> _Group:
    arrays = row.arrays
    cached_group = row.scratch.get((span, window, device))
    if isinstance(cached_group, _Group):
        return cached_group
    runs = range(*span)
    lengths = np.diff(arrays.starts)[span[0] : span[1]]
    cached = arrays.cached[span[0] : span[1]]
    width, num_keys = int(lengths.max()), int((cached + lengths).max())
    page_count = -(-num_keys // arrays.page_size)
    column = np.arange(width)
    real = column[None, :] < lengths[:, None]
    first = arrays.starts[span[0] : span[1], None]
    query_index = np.where(real, first + column, first)
    visible: torch.Tensor | None = None
    if len(runs) > 1 or cached[0] > 0 or arrays.mask_starts[span[0]] >= 0 or (window is not None and num_keys > window):
        blocks = np.zeros((len(runs), 1, width, num_keys), np.bool_)
        for block, s in zip(blocks, runs, strict=True):
            _fill_visible(block[0], arrays, s, window)
        visible = torch.from_numpy(blocks).to(device)
    group = _Group(
        pages=torch.from_numpy(arrays.block_table[span[0] : span[1], :page_count].astype(np.int64)).to(device),
        num_keys=num_keys,
        query_index=torch.from_numpy(query_index).to(device),
        output_index=torch.from_numpy(np.flatnonzero(real.ravel())).to(device),
        visible=visible,
    )
    row.scratch[(span, window, device)] = group
    return group


def _fill_visible(block: np.ndarray, arrays: Packed, s: int, window: int | None) -> None:
    """Marks in `block`, [N, L], what each node of run `s` may see; padding nodes see the first key, to stay finite."""
    begin, end = arrays.starts[s], arrays.starts[s + 1]
    n, cached = end - begin, arrays.cached[s]
    block[:, 0] = True
    block[:n, :cached] = True
    start = arrays.mask_starts[s]
    inside = np.tri(n, dtype=np.bool_) if start < 0 else arrays.mask[start : start + n * n].reshape(n, n)
    block[:n, cached : cached + n] = inside
    if window is not None:
        positions = arrays.positions[begin:end]
        key_positions = np.concatenate([np.arange(cached, dtype=np.int32), positions])
        block[:n, : cached + n] &= positions[:, None] - key_positions[None, :] < window


def _gathered(
    q: torch.Tensor,  # [T, H, D]
    keys: torch.Tensor,  # [P, K, page, D]
    values: torch.Tensor,
    row: PackedRow,
    span: tuple[int, int],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention by sdpa over gathered pages for the runs `span`, [T of those runs, H, D].

    The query heads of one KV head fold into rows, so keys and values are not repeated.
    """
    group = _group(row, span, window, q.device)
    num_runs, width = group.query_index.shape
    num_heads, head_dim = q.shape[1:]
    num_kv = keys.shape[1]
    fold = num_heads // num_kv

    def gather(pool: torch.Tensor) -> torch.Tensor:
        pages = pool[group.pages].transpose(1, 2)  # [S, K, B, page, D]
        return pages.reshape(num_runs, num_kv, -1, head_dim)[:, :, : group.num_keys]

    k, v = gather(keys), gather(values)
    rows = q[group.query_index].view(num_runs, width, num_kv, fold, head_dim)
    if group.visible is None and softcap is None:
        heads = rows.permute(0, 2, 3, 1, 4).reshape(num_runs, num_heads, width, head_dim)
        out = F.scaled_dot_product_attention(heads, k, v, is_causal=True, scale=scale, enable_gqa=fold > 1)
        out = out.view(num_runs, num_kv, fold, width, head_dim)
    else:
        visible = _visible_or_causal(group, width, q.device)
        heads = rows.permute(0, 2, 3, 1, 4).reshape(num_runs, num_kv, fold * width, head_dim)
        mask = visible.repeat(1, 1, fold, 1)
        out = _masked(heads, k, v, mask, scale, softcap).view(num_runs, num_kv, fold, width, head_dim)
    flat = out.permute(0, 3, 1, 2, 4).reshape(num_runs * width, num_heads, head_dim)
    return flat[group.output_index]


def _visible_or_causal(group: _Group, width: int, device: torch.device) -> torch.Tensor:
    if group.visible is not None:
        return group.visible
    return torch.ones((1, 1, width, group.num_keys), dtype=torch.bool, device=device).tril()


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v
