"""The compiled half of CPU attention: a flash-decoding kernel over a paged KV pool.

Knows addresses and sizes; nothing of torch or of how threads start: `pipeline.cpu_attention` plans and runs it.

A layer's work is cut into units (`UNIT`): some nodes of one slot against a range of its keys. All threads of a team run
the kernel and take pairs of unit and KV head from a shared counter until none is left. Query rows, that is nodes x
query heads of the KV head's group, lie across SIMD lanes: keys and values are read once for all of them, and the
softmax has no horizontal step. Keys are reduced in order, in chunks that start at multiples of `CHUNK` and are merged
in order. So what a node gets does not depend, to the last bit, on the other nodes, the rest of the batch or the number
of threads.
"""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np
from numba.np.numpy_support import carray

from pipeline import simd
from pipeline.simd import (
    Pointer,
    Vector,
    advance,
    called,
    exp,
    fetch_add,
    fill,
    fma_each,
    inlined,
    load,
    pointer,
    prefetch,
    scatter,
    store,
    store_each,
    where_less,
)

CHUNK = 128  # keys of one softmax; also the grain in which a long slot is split over threads
NARROW = 8  # query rows are padded to a multiple of this
WIDE = 16 if llvm.get_host_cpu_features().get("avx512f", False) else NARROW
SLAB = 2 * WIDE  # K and V rows are padded to a multiple of this
_BLOCK = 16  # head dimensions converted at once

UNIT = np.dtype([(name, np.int32) for name in ("slot", "node", "count", "begin", "end", "first", "part", "parts")])
"""Nodes `node..node + count` of the packed row, all of `slot`, against the cache indices `begin..end`.

With `parts` > 1 the unit, one chunk of keys, is number `part` of several for these nodes. Their partial results have
the numbers `first..first + parts` and are merged by the thread that finishes last.
"""

_ADDRESSES = (
    "query", "keys", "values", "out", "starts", "cached", "table", "positions", "mask", "mask_starts",
    "units", "scratch", "partials", "tickets",
)  # fmt: skip
_SIZES = (
    "num_units", "num_kv_heads", "group", "head_dim", "width", "rows", "page_size", "table_width",
    "query_node_stride", "query_head_stride", "scratch_size", "part_size", "window",
)  # fmt: skip
ARGS = np.dtype([(name, np.int64) for name in _ADDRESSES + _SIZES] + [("scale", np.float32), ("softcap", np.float32)])
"""What a call passes to the kernel. Sizes and strides are in elements; `window` and `softcap` are 0 when off.

`rows`, `width`, `part_size`, `scratch_size`: see `scratch_layout`. `tickets`: int64 zeros; how many threads have come,
how many units were taken, then how many parts are finished, by number of the first part and KV head.
"""

_LOWEST = -3.0e38  # in place of -inf, which less itself is NaN


class _Scratch(NamedTuple):
    """One thread's working memory, pointers to float32."""

    queries: Pointer  # [D, rows]
    staged: Pointer  # [CHUNK + 8, width], a chunk's keys, then its values
    scores: Pointer  # [CHUNK + 8, rows]
    # Results over a chunk: [rows] largest score, [rows] sum of exp(score - largest), [rows, width] weighted values.
    part: Pointer
    total: Pointer  # the same over all chunks so far


def scratch_layout(rows: int, head_dim: int) -> tuple[int, int, int]:
    """Width of a staged key or value, size of a partial result and of a thread's scratch, in floats."""
    width = -(-head_dim // SLAB) * SLAB
    part_size = rows * (width + 2)
    return width, part_size, head_dim * rows + (CHUNK + 8) * (width + rows) + 2 * part_size


@called
def _lay_out_queries(args: Any, query: Pointer, unit: Any, head: int, rows: int, queries: Pointer) -> None:
    """queries[d, i * group + g] = scaled element d of the KV head's query head g at the unit's node i; the rest 0."""
    group, head_dim, scale = args.group, args.head_dim, args.scale
    whole = head_dim - head_dim % _BLOCK
    for place in range(0, head_dim * rows, NARROW):
        store(queries, place, fill(NARROW, 0.0))
    for row in range(unit.count * group):
        node, query_head = unit.node + row // group, head * group + row % group
        base = node * args.query_node_stride + query_head * args.query_head_stride
        for d in range(0, whole, _BLOCK):
            scatter(queries, d * rows + row, rows, load(fill(_BLOCK, 0.0), query, base + d) * fill(_BLOCK, scale))
        for d in range(whole, head_dim):
            scatter(queries, d * rows + row, rows, load(fill(1, 0.0), query, base + d) * fill(1, scale))


@called
def _gather(
    args: Any,
    pool: Pointer,
    table: Pointer,
    head: int,
    begin: int,
    end: int,
    staged: Pointer,
    ahead: Pointer,
    shift: int,
) -> None:
    """Copies keys or values begins..end of a slot, whose block table row is given, out of their pages, as floats.

    Meanwhile asks memory for what is needed next: what the pool `ahead` holds `shift` keys later.
    """
    head_dim, page_size, width = args.head_dim, args.page_size, args.width
    whole = head_dim - head_dim % _BLOCK
    key, place = begin, 0
    while key < end:
        offset = key % page_size
        count = min(page_size - offset, end - key)
        base = ((np.int64(table[key // page_size]) * args.num_kv_heads + head) * page_size + offset) * head_dim
        later = (
            (np.int64(table[(key + shift) // page_size]) * args.num_kv_heads + head) * page_size + offset
        ) * head_dim
        for _ in range(count):
            for d in range(0, head_dim, 32):
                prefetch(ahead, later + d)
            for d in range(0, whole, _BLOCK):
                store(staged, place + d, load(fill(_BLOCK, 0.0), pool, base + d))
            for d in range(whole, head_dim):
                store(staged, place + d, load(fill(1, 0.0), pool, base + d))
            place += width
            base += head_dim
            later += head_dim
        key += count


@called
def _dot(
    like: Vector, queries: Pointer, rows: int, head_dim: int, keys: Pointer, width: int, count: int, scores: Pointer
) -> None:
    """scores[j] = keys[j] . queries for as many rows as `like` has lanes, eight keys at a time; rounds `count` up."""
    zero = fill(like, 0.0)
    for j in range(0, count, 8):
        sums = (zero, zero, zero, zero, zero, zero, zero, zero)
        for d in range(head_dim):
            sums = fma_each(sums, keys, j * width + d, width, load(like, queries, d * rows))
        store_each(scores, j * rows, rows, sums)


@called
def _cap(softcap: np.float32, count: int, scores: Pointer) -> None:
    """scores = softcap * tanh(scores / softcap), over `count` floats, a multiple of NARROW."""
    cap, one, two, limit = fill(NARROW, softcap), fill(NARROW, 1.0), fill(NARROW, 2.0), fill(NARROW, 80.0)
    for place in range(0, count, NARROW):
        x = two * load(cap, scores, place) / cap
        x = where_less(limit, x, limit, x)
        store(scores, place, cap * (one - two / (one + exp(x))))


@called
def _hide(args: Any, unit: Any, begin: int, end: int, rows: int, scores: Pointer) -> None:
    """Sets the scores of those keys of begin..end to -inf that a node may not see."""
    group, window = args.group, args.window
    starts, positions = pointer(args.starts, np.int32), pointer(args.positions, np.int32)
    mask, mask_start = pointer(args.mask, np.uint8), pointer(args.mask_starts, np.int64)[unit.slot]
    cached: Any = np.int64(pointer(args.cached, np.int32)[unit.slot])
    start = np.int64(starts[unit.slot])
    size = starts[unit.slot + 1] - start
    for i in range(unit.count):
        node = unit.node + i - start
        oldest = positions[unit.node + i] - window
        first = begin if window > 0 and begin <= oldest else max(begin, cached)
        for key in range(first, end):
            other = key - cached
            hidden = window > 0 and (positions[start + other] if other >= 0 else key) <= oldest
            if other >= 0 and not hidden:
                hidden = other > node if mask_start < 0 else mask[mask_start + node * size + other] == 0
            if hidden:
                for g in range(group):
                    scores[(key - begin) * rows + i * group + g] = np.float32(-np.inf)


@called
def _softmax(like: Vector, rows: int, count: int, scores: Pointer, part: Pointer) -> None:
    """scores = exp(scores - largest) for as many rows as `like` has lanes; the largest and the sum go to `part`."""
    largest = fill(like, _LOWEST)
    for j in range(count):
        x = load(like, scores, j * rows)
        largest = where_less(largest, x, x, largest)
    total = fill(like, 0.0)
    for j in range(count):
        x = exp(load(like, scores, j * rows) - largest)
        store(scores, j * rows, x)
        total = total + x
    store(part, 0, largest)
    store(part, rows, total)


@called
def _weigh(weights: Pointer, rows: int, used: int, values: Pointer, width: int, count: int, sums: Pointer) -> None:
    """sums[r] = sum over j of weights[j, r] * values[j], four rows at a time; rounds `used` up."""
    zero = fill(SLAB, 0.0)
    for row in range(0, used, 4):
        for column in range(0, width, SLAB):
            block = (zero, zero, zero, zero)
            for j in range(count):
                block = fma_each(block, weights, j * rows + row, 1, load(zero, values, j * width + column))
            store_each(sums, row * width + column, width, block)


@called
def _merge(total: Pointer, part: Pointer, rows: int, used: int, width: int) -> None:
    """Adds a part to the total: both are relative to their largest score and come to the larger of the two."""
    like, wide = fill(NARROW, 0.0), fill(SLAB, 0.0)
    for lane in range(0, rows, NARROW):
        old, new = load(like, total, lane), load(like, part, lane)
        largest = where_less(old, new, new, old)
        old_factor, new_factor = exp(old - largest), exp(new - largest)
        store(
            total, rows + lane, load(like, total, rows + lane) * old_factor + load(like, part, rows + lane) * new_factor
        )
        store(total, lane, old_factor)
        store(part, lane, new_factor)
        for row in range(lane, min(lane + NARROW, used)):
            a, b = fill(wide, total[row]), fill(wide, part[row])
            for place in range(2 * rows + row * width, 2 * rows + (row + 1) * width, SLAB):
                store(total, place, load(wide, total, place) * a + load(wide, part, place) * b)
        store(total, lane, largest)


@called
def _finish(args: Any, unit: Any, head: int, rows: int, total: Pointer, out: Pointer) -> None:
    """Writes the unit's rows of the output [T, H, D]: values divided by the sum of their weights."""
    group, head_dim, width = args.group, args.head_dim, args.width
    whole = head_dim - head_dim % _BLOCK
    for row in range(unit.count * group):
        base = ((unit.node + row // group) * args.num_kv_heads * group + head * group + row % group) * head_dim
        place = 2 * rows + row * width
        scale = np.float32(1.0) / total[rows + row]
        for d in range(0, whole, _BLOCK):
            store(out, base + d, load(fill(_BLOCK, 0.0), total, place + d) * fill(_BLOCK, scale))
        for d in range(whole, head_dim):
            store(out, base + d, load(fill(1, 0.0), total, place + d) * fill(1, scale))


@inlined
def _attend_chunk(
    args: Any, element: Any, unit: Any, head: int, rows: int, begin: int, end: int, scratch: _Scratch, part: Pointer
) -> None:
    """The unit's nodes against the keys begin..end, at most a chunk."""
    count, width = end - begin, args.width
    table = advance(pointer(args.table, np.int32), unit.slot * args.table_width)
    keys, values = pointer(args.keys, element), pointer(args.values, element)
    wide_rows = rows - rows % WIDE
    _gather(args, keys, table, head, begin, end, scratch.staged, values, 0)
    for row in range(0, wide_rows, WIDE):
        queries, scores = advance(scratch.queries, row), advance(scratch.scores, row)
        _dot(fill(WIDE, 0.0), queries, rows, args.head_dim, scratch.staged, width, count, scores)
    for row in range(wide_rows, rows, NARROW):
        queries, scores = advance(scratch.queries, row), advance(scratch.scores, row)
        _dot(fill(NARROW, 0.0), queries, rows, args.head_dim, scratch.staged, width, count, scores)
    if args.softcap > 0:
        _cap(args.softcap, count * rows, scratch.scores)
    _hide(args, unit, begin, end, rows, scratch.scores)
    for row in range(0, wide_rows, WIDE):
        _softmax(fill(WIDE, 0.0), rows, count, advance(scratch.scores, row), advance(part, row))
    for row in range(wide_rows, rows, NARROW):
        _softmax(fill(NARROW, 0.0), rows, count, advance(scratch.scores, row), advance(part, row))
    _gather(args, values, table, head, begin, end, scratch.staged, keys, CHUNK if end + CHUNK <= unit.end else 0)
    _weigh(scratch.scores, rows, unit.count * args.group, scratch.staged, width, count, advance(part, 2 * rows))


@inlined
def _attend_unit(args: Any, element: Any, unit: Any, head: int, scratch: _Scratch) -> None:
    used = unit.count * args.group
    rows = (used + NARROW - 1) // NARROW * NARROW
    _lay_out_queries(args, pointer(args.query, element), unit, head, rows, scratch.queries)
    for place in range(rows):
        scratch.total[place] = np.float32(_LOWEST)
    for place in range(rows, rows * (args.width + 2), NARROW):
        store(scratch.total, place, fill(NARROW, 0.0))
    partials = advance(pointer(args.partials, np.float32), (unit.first * args.num_kv_heads + head) * args.part_size)
    stride = args.num_kv_heads * args.part_size
    part = scratch.part if unit.parts == 1 else advance(partials, unit.part * stride)
    begin: Any = np.int64(unit.begin)
    while begin < unit.end:
        end = min(begin - begin % CHUNK + CHUNK, np.int64(unit.end))
        _attend_chunk(args, element, unit, head, rows, begin, end, scratch, part)
        if unit.parts == 1:
            _merge(scratch.total, part, rows, used, args.width)
        begin = end
    if unit.parts > 1:
        ticket = 2 + unit.first * args.num_kv_heads + head
        if fetch_add(pointer(args.tickets, np.int64), ticket) < unit.parts - 1:
            return
        for number in range(unit.parts):
            _merge(scratch.total, advance(partials, number * stride), rows, used, args.width)
    _finish(args, unit, head, rows, scratch.total, pointer(args.out, element))


def compile_kernel(element: type[np.float32] | type[np.uint16]) -> Any:
    """The kernel for a query and pools of np.float32, or of bfloat16 seen as np.uint16, as a C callback.

    Its argument is the address of an `ARGS` record. Results are complete when all threads have returned from it.
    """
    revision = zlib.crc32(Path(simd.__file__).read_bytes())

    @numba.cfunc(numba.types.void(numba.types.voidptr), cache=True, error_model="numpy")
    def kernel(address: Pointer) -> None:
        _ = revision  # numba's disk cache sees changes of this file and of closure variables only
        args = carray(address, (1,), ARGS)[0]
        units = carray(pointer(args.units, UNIT), (args.num_units,))
        tickets = pointer(args.tickets, np.int64)
        queries = advance(pointer(args.scratch, np.float32), fetch_add(tickets, 0) * args.scratch_size)
        staged = advance(queries, args.head_dim * args.rows)
        scores = advance(staged, (CHUNK + 8) * args.width)
        part = advance(scores, (CHUNK + 8) * args.rows)
        scratch = _Scratch(queries, staged, scores, part, advance(part, args.part_size))
        number = fetch_add(tickets, 1)
        while number < args.num_units * args.num_kv_heads:
            _attend_unit(args, element, units[number // args.num_kv_heads], number % args.num_kv_heads, scratch)
            number = fetch_add(tickets, 1)

    return kernel
