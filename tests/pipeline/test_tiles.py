"""Attention by tiles: the plain form and the Triton kernel, interpreted, against sdpa over gathered pages."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.attention import AttentionContext, rasd_attention
from pipeline.kv_cache import KVShape, PagedCache
from pipeline.packing import PackedRow, Run, Runs, pack, short_first
from pipeline.pages import PageRun
from pipeline.tiles import attend_by_tile, rows_per_tile, tiles_of, tiles_on
from pipeline.tree import EMPTY_TREE
from tests.pipeline.toys import trees

PAGE = 16
CPU = torch.device("cpu")


@st.composite
def rows(draw: st.DrawFn) -> list[Run]:
    """Runs of all kinds: prefill chunks, roots with and without trees, trees of which some nodes are done."""
    runs, first = [], 0
    for _ in range(draw(st.integers(1, 4))):
        known = draw(st.integers(1, 30))
        tree = draw(trees(max_nodes=20, vocabulary=40)) if known == 1 else EMPTY_TREE
        cached = draw(st.integers(0, 50))
        done = draw(st.integers(0, len(tree))) if len(tree) else 0
        count = -(-(cached + known + len(tree)) // PAGE)
        pages = PageRun.of(range(first, first + count))
        first += count
        runs.append(Run(np.ones(known, np.int32), tree, cached, pages, True, done))
    return runs


caps = st.sampled_from([None, 0.5, 30.0])


class Layer(torch.nn.Module):
    """What the attention function asks of its module."""

    layer_idx = 0


def packed(runs: list[Run], heads: int, kv: int, dim: int, seed: int) -> tuple[PackedRow, PagedCache, torch.Tensor]:
    """The packed row, a cache of random numbers, and random queries [C, H, D]."""
    ordered, _, num_short = short_first(Runs.of(runs, PAGE))
    row = PackedRow(pack(ordered, num_short, PAGE), CPU)
    draws = torch.Generator().manual_seed(seed)
    cache = PagedCache(KVShape(1, kv, dim, torch.float32), sum(len(run.pages.pages) for run in runs), PAGE, CPU)
    for pool in (*cache.keys, *cache.values):
        pool.copy_(torch.randn(pool.shape, generator=draws))
    return row, cache, torch.randn(row.token_ids.shape[1], heads, dim, generator=draws)


def expected(
    row: PackedRow, cache: PagedCache, query: torch.Tensor, window: int | None, softcap: float | None
) -> torch.Tensor:
    """By the numba kernel and sdpa, which tests/pipeline/test_cpu_attention.py holds against plain loops."""
    context = AttentionContext(row, cache)
    heads = query.transpose(0, 1)[None]
    out, _ = rasd_attention(Layer(), heads, heads, heads, None, packed=context, sliding_window=window, softcap=softcap)
    return out[0]


@settings(deadline=None, max_examples=60)
@given(rows(), st.sampled_from([(4, 2), (9, 3), (3, 3)]), st.sampled_from([None, 7]), caps, st.integers(0, 1 << 20))
def test_plain_tiles_equal_sdpa(
    runs: list[Run], shape: tuple[int, int], window: int | None, softcap: float | None, seed: int
) -> None:
    row, cache, query = packed(runs, *shape, 16, seed)
    work = tiles_on(row.arrays, rows_per_tile(shape[0] // shape[1]), CPU)
    got = attend_by_tile(
        query, cache.keys[0], cache.values[0], work, scale=0.25, sliding_window=window, softcap=softcap
    )
    torch.testing.assert_close(got, expected(row, cache, query, window, softcap), atol=2e-5, rtol=1e-4)


@settings(deadline=None, max_examples=25)
@given(rows(), st.sampled_from([(4, 2), (9, 3), (3, 3)]), st.sampled_from([None, 7]), caps, st.integers(0, 1 << 20))
def test_the_kernel_equals_sdpa(
    runs: list[Run], shape: tuple[int, int], window: int | None, softcap: float | None, seed: int
) -> None:
    assert_kernel_exact(runs, (*shape, 16), window, softcap, seed)


@settings(deadline=None, max_examples=4)
@given(rows(), st.sampled_from([None, 7]), st.integers(0, 1 << 20))
def test_the_kernel_equals_sdpa_with_wide_heads(runs: list[Run], window: int | None, seed: int) -> None:
    assert_kernel_exact(runs, (4, 2, 160), window, None, seed)


def assert_kernel_exact(
    runs: list[Run], shape: tuple[int, int, int], window: int | None, softcap: float | None, seed: int
) -> None:
    pytest.importorskip("triton")
    from pipeline.gpu_attention import attend

    row, cache, query = packed(runs, *shape, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the interpreter wants the latter
    work = tiles_on(row.arrays, rows_per_tile(shape[0] // shape[1]), device)
    tensors = (tensor.to(device) for tensor in (query, cache.keys[0], cache.values[0]))
    got = attend(*tensors, work, scale=shape[2] ** -0.5, sliding_window=window, softcap=softcap).cpu()
    torch.testing.assert_close(got, expected(row, cache, query, window, softcap), atol=2e-5, rtol=1e-4)


@settings(deadline=None)
@given(rows(), st.integers(1, 12))
def test_tiles_hold_every_computed_row_once(runs: list[Run], num_rows: int) -> None:
    ordered, _, num_short = short_first(Runs.of(runs, PAGE))
    tiles = tiles_of(pack(ordered, num_short, PAGE), num_rows)
    held = [row for tile in tiles.tolist() for row in range(tile[0], tile[0] + tile[1])]
    assert held == list(range(sum(len(run) - run.num_done for run in runs)))
    assert tiles[:, 1].max() <= num_rows and tiles[:, 1].min() > 0
