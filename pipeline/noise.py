"""Stateless Gumbel noise: the same (seed, position, token id) gives the same number on every machine and device.

Speculation, batching, sharding and restarts then cannot change sampled text: the noise belongs to a place in the
output, not to a call. The numba and the torch form below use integer operations and single IEEE additions and
multiplications only (no library logarithm, no fused multiply-add), so they agree to the bit, on CPU and on CUDA.

Source: Gumbel-max (Maddison et al., arXiv 1411.0030); splitmix64 (Steele et al., OOPSLA 2014); logarithm after
Cephes' logf.
"""

import numpy as np
import torch
from numba import njit

_GOLDEN = 0x9E3779B97F4A7C15
_TOKEN_STRIDE = 0xD1B54A32D192ED03
_MASK64 = (1 << 64) - 1

_LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SQRT_HALF_BITS = 0x3F3504F3
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
_SMALL = 2.0**-6  # below it, -log(1 - v) comes from its series: 1 - v would round v's low bits away
_BELOW_ONE = 1.0 - 2.0**-24


def _mix(value: int) -> int:
    """splitmix64's finaliser on an unsigned 64-bit integer."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def row_seed(job_seed: int, row_index: int, sample: int) -> int:
    """The 64-bit seed of one sample, as a signed integer (the output column `seed`)."""
    state = _mix(job_seed + _GOLDEN)
    state = _mix(state ^ _mix(row_index + 2 * _GOLDEN))
    return _signed(_mix(state ^ _mix(sample + 3 * _GOLDEN)))


def position_key(seed: int, position: int) -> int:
    """The 64-bit key of all noise at one output position, as a signed integer.

    `position` is the sequence position of the token being chosen, prompt included; all nodes of a tree at that
    position share it.
    """
    return _signed(_mix((seed & _MASK64) ^ _mix(position + _GOLDEN)))


@njit(nogil=True)
def _log(x: np.float32) -> np.float32:
    bits = np.int32(np.float32(x).view(np.int32) - np.int32(_SQRT_HALF_BITS))
    exponent = np.float32(bits >> np.int32(23))
    m = np.int32((bits & np.int32(0x007FFFFF)) + np.int32(_SQRT_HALF_BITS)).view(np.float32) - np.float32(1.0)
    z = m * m
    p = np.float32(_LOG_COEFFICIENTS[0])
    p = p * m + np.float32(_LOG_COEFFICIENTS[1])
    p = p * m + np.float32(_LOG_COEFFICIENTS[2])
    p = p * m + np.float32(_LOG_COEFFICIENTS[3])
    p = p * m + np.float32(_LOG_COEFFICIENTS[4])
    p = p * m + np.float32(_LOG_COEFFICIENTS[5])
    p = p * m + np.float32(_LOG_COEFFICIENTS[6])
    p = p * m + np.float32(_LOG_COEFFICIENTS[7])
    p = p * m + np.float32(_LOG_COEFFICIENTS[8])
    p = p * m * z
    p = p + exponent * np.float32(_LN2_LOW)
    p = p - np.float32(0.5) * z
    return (m + p) + exponent * np.float32(_LN2_HIGH)


@njit(nogil=True)
def _gumbel_of(key: np.uint64, token_id: np.int64) -> np.float32:
    h = key + np.uint64(token_id) * np.uint64(_TOKEN_STRIDE)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    h = h ^ (h >> np.uint64(31))
    v = np.float32(np.int64(h >> np.uint64(1)) | np.int64(1)) * np.float32(2.0**-63)
    v = min(v, np.float32(_BELOW_ONE))
    series = v * (np.float32(1.0) + v * (np.float32(1 / 2) + v * (np.float32(1 / 3) + v * np.float32(1 / 4))))
    exponential = series if v < np.float32(_SMALL) else -_log(np.float32(1.0) - v)
    return -_log(exponential)


@njit(cache=True, nogil=True)
def _gumbel_rows(keys: np.ndarray, token_ids: np.ndarray, out: np.ndarray) -> None:
    for row in range(token_ids.shape[0]):
        key = np.uint64(keys[row])
        for column in range(token_ids.shape[1]):
            out[row, column] = _gumbel_of(key, token_ids[row, column])


def gumbel(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for every (row, token).

    Args:
        keys: [M] int64, from `position_key`.
        token_ids: [M, C] int64.

    Returns:
        [M, C] float32. Its uniform variate has 63 bits near zero, so tokens far below 1e-7 keep their probability.
    """
    if token_ids.device.type != "cpu":
        return _gumbel_torch(keys, token_ids)
    out = torch.empty(token_ids.shape, dtype=torch.float32)
    _gumbel_rows(keys.numpy(), token_ids.numpy(), out.numpy())
    return out


def _log_torch(x: torch.Tensor) -> torch.Tensor:
    bits = x.view(torch.int32) - _SQRT_HALF_BITS
    exponent = (bits >> 23).to(torch.float32)
    m = ((bits & 0x007FFFFF) + _SQRT_HALF_BITS).view(torch.float32) - 1.0
    z = m * m
    p = torch.full_like(m, _LOG_COEFFICIENTS[0])
    for coefficient in _LOG_COEFFICIENTS[1:]:
        p = p * m
        p = p + coefficient
    p = p * m * z
    p = p + exponent * _LN2_LOW
    p = p - z * 0.5
    return (m + p) + exponent * _LN2_HIGH


def _gumbel_torch(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The device form of `_gumbel_rows`; int64 multiplication wraps, logical shifts are arithmetic ones masked."""

    def logical_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    h = keys.unsqueeze(1) + token_ids * _signed(_TOKEN_STRIDE)
    h = (h ^ logical_shift(h, 30)) * _signed(0xBF58476D1CE4E5B9)
    h = (h ^ logical_shift(h, 27)) * _signed(0x94D049BB133111EB)
    h = h ^ logical_shift(h, 31)
    v = (logical_shift(h, 1) | 1).to(torch.float32) * 2.0**-63
    v = torch.clamp(v, max=_BELOW_ONE)
    series = v * (v * (v * (v * 0.25 + 1 / 3) + 0.5) + 1.0)
    exponential = torch.where(v < _SMALL, series, -_log_torch(1.0 - v))
    return -_log_torch(exponential)
