"""The noise is one function of (seed, position, token), the same to the bit everywhere, and it is Gumbel noise."""

import hashlib
import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.noise import _gumbel_torch, gumbel, position_key, row_seed

MASK64 = (1 << 64) - 1
EULER_GAMMA = 0.5772156649015329
int64s = st.integers(-(1 << 63), (1 << 63) - 1)
token_ids = st.integers(0, (1 << 31) - 1)


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def key_with_hash(value: int) -> int:
    """The key at which token 0 hashes to the 64-bit `value`: splitmix64's finaliser backwards."""
    value ^= (value >> 31) ^ (value >> 62)
    value = value * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK64
    value ^= (value >> 27) ^ (value >> 54)
    value = value * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK64
    value ^= (value >> 30) ^ (value >> 60)
    return signed(value)


def gumbel_of_hashes(values: list[int]) -> torch.Tensor:
    keys = torch.tensor([key_with_hash(value) for value in values])
    return gumbel(keys, torch.zeros((len(values), 1), dtype=torch.int64))[:, 0]


def spread_hashes() -> list[int]:
    """64-bit values near 0, near the top, next to every power of two, and in between."""
    powers = [(1 << bits) + offset for bits in range(64) for offset in (-2, -1, 0, 1, 2)]
    edges = [value & MASK64 for value in [*powers, *(-power for power in powers)]]
    return edges + [int(x) for x in np.random.default_rng(1).integers(0, 1 << 64, 5000, np.uint64)]


def exact_gumbel(value: int) -> float:
    v = float(np.float32((value >> 1) | 1)) / (1 << 63)  # near 1 a coarse variate: it decides only how low a loser is
    return -math.log(-math.log1p(-min(v, 1 - 2.0**-24)))


def noise_input() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and tokens of ordinary rows, and rows whose first token has a hash at an edge."""
    keys = [position_key(row_seed(7, row, 0), row * 13) for row in range(64)]
    keys += [key_with_hash(value) for value in spread_hashes()]
    ids = torch.randint(0, 1 << 31, (len(keys), 20), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = 0
    ids[:, 1] = (1 << 31) - 1
    return torch.tensor(keys), ids


def assert_same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.dtype == right.dtype == torch.float32
    assert torch.equal(left.cpu().view(torch.int32), right.cpu().view(torch.int32))


def test_numba_and_torch_agree_to_the_bit() -> None:
    keys, ids = noise_input()
    assert_same_bits(gumbel(keys, ids), _gumbel_torch(keys, ids))


@pytest.mark.gpu
def test_cuda_agrees_with_numba_to_the_bit() -> None:
    keys, ids = noise_input()
    assert_same_bits(gumbel(keys, ids), gumbel(keys.cuda(), ids.cuda()))


@settings(deadline=None, max_examples=60)
@given(st.lists(int64s, min_size=1, max_size=8), st.lists(token_ids, min_size=1, max_size=8))
def test_numba_and_torch_agree_for_any_key_and_token(keys: list[int], ids: list[int]) -> None:
    key_tensor, id_tensor = torch.tensor(keys), torch.tensor(ids).repeat(len(keys), 1)
    assert_same_bits(gumbel(key_tensor, id_tensor), _gumbel_torch(key_tensor, id_tensor))


def test_noise_is_pinned() -> None:
    """A change of the function would change the text of jobs that are resumed."""
    keys = torch.tensor([position_key(row_seed(0, row, 1), row + 5) for row in range(50)])
    noise = gumbel(keys, torch.arange(1000).repeat(50, 1))
    digest = hashlib.sha256(noise.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "d884dd12844f5b6b3f18238cb76cd623355d49e2fc0fdedee0c216e16cfeb98b"


def test_noise_of_a_token_does_not_depend_on_its_batch() -> None:
    keys, ids = noise_input()
    whole = gumbel(keys, ids)
    rows = torch.randperm(len(keys), generator=torch.Generator().manual_seed(4))[:100]
    columns = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(5))[:7]
    assert_same_bits(gumbel(keys[rows], ids[rows]), whole[rows])
    assert_same_bits(gumbel(keys, ids[:, columns]), whole[:, columns])
    assert_same_bits(gumbel(keys[3:4], ids[3:4, 5:6]), whole[3:4, 5:6])
    assert_same_bits(gumbel(keys, ids.t().contiguous().t()), whole)


def test_no_rows_and_no_columns() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    assert gumbel(nothing, nothing.view(0, 5)).shape == (0, 5)
    assert gumbel(torch.zeros(3, dtype=torch.int64), nothing.view(3, 0)).shape == (3, 0)


def test_values_follow_the_exact_logarithms() -> None:
    hashes = spread_hashes()
    exact = torch.tensor([exact_gumbel(value) for value in hashes], dtype=torch.float64)
    error = (gumbel_of_hashes(hashes).double() - exact).abs()
    assert float((error / exact.abs().clamp(min=1.0)).max()) < 6e-7


@pytest.mark.parametrize("probability", [1e-3, 1e-6, 1e-9, 1e-12, 1e-15])
def test_rare_tokens_keep_their_probability(probability: float) -> None:
    """P(g > -log p) is 1 - exp(-p): exact to 1e-5 even where a 24-bit or 32-bit uniform variate has no value left."""
    threshold = -math.log(probability)
    low, high = 0, 1 << 64
    while high - low > 1:  # the noise falls as the hash grows: find where it crosses the threshold
        middle = (low + high) // 2
        low, high = (middle, high) if float(gumbel_of_hashes([middle])[0]) > threshold else (low, middle)
    assert high / (1 << 64) == pytest.approx(-math.expm1(-probability), rel=1e-5)


def test_noise_falls_as_the_hash_grows() -> None:
    noise = gumbel_of_hashes(sorted(spread_hashes()))
    assert bool((noise.diff() <= 1e-6).all())


@pytest.mark.parametrize("axis", ["tokens", "positions", "rows", "samples"])
def test_moments_and_distribution_are_gumbel(axis: str) -> None:
    """Along each axis on its own: neighbours are independent and their values standard Gumbel."""
    n = 1 << 16
    if axis == "tokens":
        noise = gumbel(torch.tensor([position_key(row_seed(1, 2, 3), 4)]), torch.arange(n)[None])[0]
    else:
        steps = {"rows": (1, 0, 0), "samples": (0, 1, 0), "positions": (0, 0, 1)}
        row, sample, position = steps[axis]
        keys = [position_key(row_seed(1, i * row, i * sample), i * position) for i in range(n)]
        noise = gumbel(torch.tensor(keys), torch.full((n, 1), 77))[:, 0]
    values = noise.double().numpy()
    assert abs(values.mean() - EULER_GAMMA) < 5 * math.sqrt(math.pi**2 / 6 / n)
    assert values.var() == pytest.approx(math.pi**2 / 6, rel=0.04)
    uniform = np.sort(np.exp(-np.exp(-values)))
    distance = np.abs(uniform - (np.arange(n) + 0.5) / n).max()
    assert distance * math.sqrt(n) < 1.95  # Kolmogorov-Smirnov, one in a thousand
    for lag in (1, 2, 16):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / math.sqrt(n)


def test_row_seeds_and_position_keys_are_distinct_signed_64_bit() -> None:
    seeds = [row_seed(job, row, sample) for job, row, sample in product(range(4), range(500), range(4))]
    seeds += [row_seed(-1, 0, 0), row_seed(1 << 60, 0, 0), row_seed(0, (1 << 63) - 1, 0)]
    keys = [position_key(seed, position) for seed in seeds[:200] for position in range(50)]
    for values in (seeds, keys):
        assert len(set(values)) == len(values)
        assert all(-(1 << 63) <= value < 1 << 63 for value in values)
        assert any(value < 0 for value in values) and any(value > 0 for value in values)


@given(int64s, st.integers(0, 1 << 20))
def test_a_seed_means_the_same_signed_and_unsigned(seed: int, position: int) -> None:
    assert position_key(seed, position) == position_key(seed & MASK64, position)
