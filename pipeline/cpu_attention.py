"""Ragged tree attention over a paged KV pool on the CPU: `pipeline.cpu_kernel`, planned and run on threads.

The threads are torch's own: a team of the OpenMP runtime that torch has loaded, entered through its `GOMP_parallel`.
Numba's thread pools are not used, because a second pool and torch's spin against each other between two layers.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from pipeline.cpu_kernel import ARGS, CHUNK, NARROW, UNIT, compile_kernel, scratch_layout

_MAX_ROWS = (
    48  # query rows of a unit, unless one node has more: their scores and a chunk of K or V stay in the L2 cache
)
_UNITS_PER_THREAD = (
    4  # a slot's keys are split when its share of the work is larger than one unit of this many a thread
)
_Args: Any = np.ctypeslib.as_ctypes_type(cast(Any, ARGS))


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Which node of a packed row sees which keys. The arrays are contiguous and not changed afterwards.

    Only one thread may use a batch at a time: it keeps the working memory of its calls.

    Attributes:
        starts: [S + 1] int32, the rows of each slot's run.
        cached: [S] int32, tokens in the cache before the run; run node i is at cache index cached + i.
        block_table: [S, B] int32, cache index j is in page block_table[s, j // page].
        positions: [T] int32, the position of each node; cached token j has position j.
        mask: bool, one n x n block for each tree run of n nodes: whether node i may see run node j, itself included.
        mask_starts: [S] int64, where the slot's block starts in `mask`; -1 for a chain, where node i sees nodes 0..i.
    """

    starts: np.ndarray
    cached: np.ndarray
    block_table: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    mask_starts: np.ndarray
    _calls: dict[tuple[object, ...], "_Call"] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        arrays = (self.starts, self.cached, self.block_table, self.positions, self.mask, self.mask_starts)
        dtypes = (np.int32, np.int32, np.int32, np.int32, np.bool_, np.int64)
        assert all(a.dtype == d and a.flags.c_contiguous for a, d in zip(arrays, dtypes, strict=True))


@cache
def is_available() -> bool:
    """Whether `attend` works here: torch's threads must be those of libgomp, as in the Linux builds."""
    return _enter_team() is not None


def attend(
    query: torch.Tensor,  # [T, H, D]
    keys: torch.Tensor,  # [P, K, page, D]
    values: torch.Tensor,  # [P, K, page, D]
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of every node over its slot's cached tokens and its visible run nodes, [T, H, D] contiguous.

    Softmax of `scale * q.k`, or of `softcap * tanh(scale * q.k / softcap)`, in float32. With a window W a key is
    visible only if it is less than W positions before the query.

    Args:
        query: float32 or bfloat16; any strides, as long as the last is 1.
        keys, values: one layer of the KV pool, contiguous, of query's dtype, the run nodes' own already written.
    """
    assert query.dtype in (torch.float32, torch.bfloat16) and query.dtype == keys.dtype == values.dtype
    assert query.stride(2) == 1 and keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape
    num_threads = torch.get_num_threads()
    window = sliding_window or 0
    shape = (query.shape, keys.shape[1:], num_threads, window)
    call = batch._calls.get(shape)
    if call is None:
        call = batch._calls[shape] = _prepare(batch, query, keys, num_threads, window)
    out = torch.empty(query.shape, dtype=query.dtype)
    args = call.args
    args.query, args.keys, args.values, args.out = query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr()
    args.query_node_stride, args.query_head_stride = query.stride(0), query.stride(1)
    args.scale, args.softcap = scale, softcap or 0.0
    call.tickets.fill(0)
    enter_team = _enter_team()
    assert enter_team is not None, "attend needs is_available()"
    enter_team(_kernel_address(query.dtype), ctypes.addressof(args), num_threads, 0)
    return out


@dataclass(frozen=True, slots=True)
class _Call:
    """What calls with one batch and one set of shapes share; `args` points into the other two."""

    args: Any
    units: np.ndarray
    tickets: np.ndarray
    memory: torch.Tensor


def _prepare(batch: AttentionBatch, query: torch.Tensor, keys: torch.Tensor, num_threads: int, window: int) -> _Call:
    num_kv_heads, page_size, head_dim = keys.shape[1:]
    group = query.shape[1] // num_kv_heads
    units, num_parts = _plan(batch, group, num_threads, window)
    rows = -(-int(units["count"].max()) * group // NARROW) * NARROW
    width, part_size, scratch_size = scratch_layout(rows, head_dim)
    memory = torch.empty(num_threads * scratch_size + num_parts * num_kv_heads * part_size, dtype=torch.float32)
    tickets = np.zeros(2 + num_parts * num_kv_heads, np.int64)
    arrays = {
        "starts": batch.starts,
        "cached": batch.cached,
        "table": batch.block_table,
        "positions": batch.positions,
        "mask": batch.mask,
        "mask_starts": batch.mask_starts,
        "units": units,
        "tickets": tickets,
    }
    args = _Args(
        **{name: array.ctypes.data for name, array in arrays.items()},
        scratch=memory.data_ptr(),
        partials=memory.data_ptr() + 4 * num_threads * scratch_size,
        num_units=len(units),
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        width=width,
        rows=rows,
        page_size=page_size,
        table_width=batch.block_table.shape[1],
        scratch_size=scratch_size,
        part_size=part_size,
        window=window,
    )
    return _Call(args, units, tickets, memory)


def _plan(batch: AttentionBatch, group: int, num_threads: int, window: int) -> tuple[np.ndarray, int]:
    """Cuts the batch into units, the most work first, and counts those that are parts of a split."""
    step = max(1, _MAX_ROWS // group)
    tiles: list[tuple[int, int, int, int, int, int]] = []  # work, slot, node, count, begin, end
    starts, mask_starts = batch.starts.tolist(), batch.mask_starts.tolist()
    for slot, cached in enumerate(batch.cached.tolist()):
        for node in range(starts[slot], starts[slot + 1], step):
            count = min(step, starts[slot + 1] - node)
            last = node + count if mask_starts[slot] < 0 else starts[slot + 1]
            end = cached + last - starts[slot]
            oldest = int(batch.positions[node : node + count].min()) - window + 1 if window else 0
            begin = min(max(0, oldest), cached)  # a run node's position says nothing of its index
            work = -(-count * group // NARROW) * (end - begin)
            tiles.append((work, slot, node, count, begin, end))
    tiles.sort(key=lambda tile: tile[0], reverse=True)
    share = sum(tile[0] for tile in tiles) // (_UNITS_PER_THREAD * num_threads)
    units: list[tuple[int, ...]] = []
    num_parts = 0
    for work, slot, node, count, begin, end in tiles:
        edges = [begin, end]
        if num_threads > 1 and work > share:
            edges = [begin, *range(begin - begin % CHUNK + CHUNK, end, CHUNK), end]
        parts = len(edges) - 1
        first = num_parts if parts > 1 else 0
        units += [(slot, node, count, edges[i], edges[i + 1], first, i, parts) for i in range(parts)]
        num_parts += parts if parts > 1 else 0
    return np.array(units, UNIT), num_parts


@cache
def _kernel_address(dtype: torch.dtype) -> int:
    address: int = compile_kernel(np.float32 if dtype == torch.float32 else np.uint16).address
    return address


@cache
def _enter_team() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel(function, argument, num_threads, flags)` of the OpenMP runtime torch runs on; None without it."""
    libraries = Path(torch.__file__).parent / "lib"
    try:  # a symbol is looked up in the library's dependencies too, so this finds the very runtime torch is linked to
        enter: Any = ctypes.CDLL(str(libraries / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    enter.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    enter.restype = None
    call: Callable[[int, int, int, int], None] = enter
    return call
