"""The CPU kernel against attention written out in float64, on random ragged batches of chains and trees."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cpu_attention import AttentionBatch, attend, is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="torch's OpenMP runtime is not libgomp")

# (relative, absolute). All sums are float32; the result is rounded once, for bfloat16 to 8 bits.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2**-8, 1e-5)}


@dataclass(frozen=True, slots=True)
class Case:
    query: torch.Tensor  # [T, H, D]
    keys: torch.Tensor  # [P, K, page, D]
    values: torch.Tensor
    batch: AttentionBatch
    window: int | None = None
    softcap: float | None = None

    def attend(self) -> torch.Tensor:
        scale = self.query.shape[-1] ** -0.5
        return attend(
            self.query,
            self.keys,
            self.values,
            self.batch,
            scale=scale,
            sliding_window=self.window,
            softcap=self.softcap,
        )


@dataclass(frozen=True, slots=True)
class Shape:
    num_kv_heads: int = 3
    group: int = 3
    head_dim: int = 64
    page: int = 32
    dtype: torch.dtype = torch.float32


def make_case(
    rng: np.random.Generator,
    runs: list[tuple[int, int, bool]],  # cached tokens, nodes, whether a random tree or a chain
    shape: Shape,
    window: int | None = None,
    softcap: float | None = None,
) -> Case:
    lengths = [nodes for _, nodes, _ in runs]
    masks, mask_starts, positions = [np.empty(0, np.bool_)], [], []
    for cached, nodes, is_tree in runs:
        parents = [int(rng.integers(-1, i)) if is_tree else i - 1 for i in range(nodes)]
        visible = np.eye(nodes, dtype=np.bool_)
        for i, parent in enumerate(parents):
            if parent >= 0:
                visible[i] |= visible[parent]
        positions.append(cached + visible.sum(1) - 1)
        mask_starts.append(sum(mask.size for mask in masks) if is_tree else -1)
        if is_tree:
            masks.append(visible.ravel())
    pages_per_slot = max(-(-(cached + nodes) // shape.page) for cached, nodes, _ in runs)
    table = rng.permutation(len(runs) * pages_per_slot).astype(np.int32).reshape(len(runs), -1)
    batch = AttentionBatch(
        starts=np.cumsum([0, *lengths]).astype(np.int32),
        cached=np.array([cached for cached, _, _ in runs], np.int32),
        block_table=table,
        positions=np.concatenate(positions).astype(np.int32),
        mask=np.concatenate(masks),
        mask_starts=np.array(mask_starts, np.int64),
    )
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(shape.dtype)

    pool = (table.size, shape.num_kv_heads, shape.page, shape.head_dim)
    # The model's layout: heads before tokens.
    query = 3 * normal(shape.num_kv_heads * shape.group, sum(lengths), shape.head_dim).transpose(0, 1)
    return Case(query, normal(*pool), normal(*pool), batch, window, softcap)


def slot_keys(pool: torch.Tensor, table: np.ndarray, length: int) -> torch.Tensor:
    """A slot's keys or values in order, [K, length, D] float64."""
    pages = pool[torch.from_numpy(table).long()].transpose(0, 1)
    return pages.reshape(pool.shape[1], -1, pool.shape[3])[:, :length].double()


def oracle(case: Case) -> torch.Tensor:
    """Attention in float64 from the definition, [T, H, D]."""
    batch, outputs = case.batch, []
    group = case.query.shape[1] // case.keys.shape[1]
    for slot, cached in enumerate(batch.cached.tolist()):
        begin, end = batch.starts[slot : slot + 2].tolist()
        nodes, start = end - begin, batch.mask_starts[slot]
        visible = np.ones((nodes, cached + nodes), np.bool_)
        block = batch.mask[start : start + nodes**2].reshape(nodes, nodes) if start >= 0 else np.tri(nodes)
        visible[:, cached:] = block
        if case.window is not None:
            key_positions = np.concatenate([np.arange(cached), batch.positions[begin:end]])
            visible &= batch.positions[begin:end, None] - key_positions < case.window
        keys, values = (slot_keys(pool, batch.block_table[slot], cached + nodes) for pool in (case.keys, case.values))
        query = case.query[begin:end].double().view(nodes, -1, group, case.query.shape[2])  # [N, K, G, D]
        scores = torch.einsum("nkgd,kld->kgnl", query, keys) * case.query.shape[2] ** -0.5
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        weights = scores.masked_fill(~torch.from_numpy(visible), -torch.inf).softmax(-1)
        outputs.append(torch.einsum("kgnl,kld->nkgd", weights, values).flatten(1, 2))
    return torch.cat(outputs)


def assert_exact(case: Case) -> None:
    relative, absolute = TOLERANCE[case.query.dtype]
    actual = case.attend()
    assert actual.dtype == case.query.dtype and actual.is_contiguous()
    torch.testing.assert_close(actual.double(), oracle(case), rtol=relative, atol=absolute)


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


shapes = st.builds(
    Shape,
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 20, 64, 80, 128]),
    page=st.sampled_from([16, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
run = st.tuples(st.one_of(st.integers(0, 40), st.integers(100, 400)), st.integers(1, 24), st.booleans())


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    runs=st.lists(run, min_size=1, max_size=5),
    shape=shapes,
    window=st.one_of(st.none(), st.integers(1, 300)),
    softcap=st.one_of(st.none(), st.sampled_from([2.0, 50.0])),
)
def test_equals_float64_attention_on_any_batch(
    seed: int, runs: list[tuple[int, int, bool]], shape: Shape, window: int | None, softcap: float | None
) -> None:
    assert_exact(make_case(np.random.default_rng(seed), runs, shape, window, softcap))


@pytest.mark.parametrize("is_tree", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_runs_and_keys_split_over_threads(num_threads: int, dtype: torch.dtype, is_tree: bool) -> None:
    runs = [(1500, 64, is_tree), (3, 200, is_tree)]
    assert_exact(make_case(np.random.default_rng(num_threads), runs, Shape(dtype=dtype)))


def test_window_smaller_than_the_run_hides_all_cached_keys() -> None:
    case = make_case(np.random.default_rng(0), [(300, 40, False), (300, 40, True)], Shape(), window=8)
    assert_exact(case)
    cached_only = replace(case, values=case.values.clone())
    for slot in range(2):  # what lies far before the window must not matter
        cached_only.values[torch.from_numpy(case.batch.block_table[slot, :9]).long()] = 1e6
    assert torch.equal(case.attend(), cached_only.attend())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_node_depends_on_its_own_keys_only_to_the_last_bit(num_threads: int, dtype: torch.dtype) -> None:
    """Neither the number of threads, nor other slots, nor the other nodes of the run change a node's result."""
    runs = [(700, 20, False), (90, 7, True), (0, 3, False), (260, 1, False)]
    case = make_case(np.random.default_rng(1), runs, Shape(dtype=dtype))
    together = case.attend()
    before = num_threads
    torch.set_num_threads(1)
    assert torch.equal(together, replace(case, batch=_slots(case.batch, range(4))).attend())
    torch.set_num_threads(before)
    for slot in range(4):
        begin, end = case.batch.starts[slot : slot + 2].tolist()
        alone = replace(case, query=case.query[begin:end], batch=_slots(case.batch, [slot])).attend()
        assert torch.equal(alone, together[begin:end])
    for node in range(20):
        single = AttentionBatch(
            starts=np.array([0, 1], np.int32),
            cached=np.array([700 + node], np.int32),
            block_table=case.batch.block_table[:1],
            positions=np.array([700 + node], np.int32),
            mask=np.empty(0, np.bool_),
            mask_starts=np.array([-1], np.int64),
        )
        alone = replace(case, query=case.query[node : node + 1], batch=single).attend()
        assert torch.equal(alone[0], together[node])


def _slots(batch: AttentionBatch, slots: "range | list[int]") -> AttentionBatch:
    """The same slots in a batch of their own; the masks stay where they are."""
    chosen = list(slots)
    ranges = [range(*batch.starts[slot : slot + 2].tolist()) for slot in chosen]
    return AttentionBatch(
        starts=np.cumsum([0, *map(len, ranges)]).astype(np.int32),
        cached=batch.cached[chosen],
        block_table=batch.block_table[chosen],
        positions=batch.positions[list(itertools.chain(*ranges))],
        mask=batch.mask,
        mask_starts=batch.mask_starts[chosen],
    )


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_nan_reaches_the_nodes_that_see_it_and_no_others(softcap: float | None) -> None:
    case = make_case(np.random.default_rng(2), [(200, 6, True), (200, 6, True)], Shape(), softcap=softcap)
    page = case.batch.block_table[1, 2]
    case.keys[page, 1, 5, 7] = torch.nan
    bad = case.attend().isnan().all(-1)  # [T, H]
    expected = torch.zeros(12, 9, dtype=torch.bool)
    expected[6:, 3:6] = True  # the second slot's nodes, the query heads of KV head 1
    assert torch.equal(bad, expected)


def test_garbage_in_unused_cache_places_does_not_matter() -> None:
    case = make_case(np.random.default_rng(3), [(61, 1, False), (13, 5, True)], Shape(page=16))
    clean = case.attend()
    for slot, used in enumerate((62, 18)):
        for index in range(used, case.batch.block_table.shape[1] * 16):
            page = case.batch.block_table[slot, index // 16]
            case.keys[page, :, index % 16] = torch.nan
            case.values[page, :, index % 16] = torch.inf
    assert torch.equal(clean, case.attend())


def test_one_batch_serves_layers_with_different_windows_and_pools() -> None:
    case = make_case(np.random.default_rng(4), [(150, 9, True)], Shape())
    for window in (None, 16, None, 64):
        assert_exact(replace(case, window=window, values=case.values.flip(0)))
