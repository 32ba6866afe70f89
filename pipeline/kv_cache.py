"""The KV pool as a transformers `Cache`: keys and values of all layers, in pages that slots share by block tables.

Knows where tensors lie, not who owns them (`pipeline.pages`) nor how attention reads them (`pipeline.attention`).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers.cache_utils import Cache

from pipeline.packing import PackedRow

_CACHE_LINE = 64


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token costs: `num_layers` x 2 x K heads x D numbers of `dtype`."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class PagedCache(Cache):
    """Keys and values, each [layers, P, K, page, D]; a forward pass writes where its `PackedRow` says.

    Zeroed at first: padding gathered past a sequence's end is multiplied by zero and must be finite.
    """

    def __init__(self, shape: KVShape, num_pages: int, page_size: int, device: torch.device) -> None:
        super().__init__(layers=[])
        size = (shape.num_layers, num_pages, shape.num_kv_heads, page_size, shape.head_dim)
        self.keys = _zeros(size, shape.dtype, device)
        self.values = _zeros(size, shape.dtype, device)
        self.shape = shape
        self.page_size = page_size
        self._flat_keys = self.keys.view(shape.num_layers, -1, shape.head_dim)
        self._flat_values = self.values.view(shape.num_layers, -1, shape.head_dim)
        self._rows = torch.empty(0, dtype=torch.int64, device=device)  # [K * T] where the current row's tokens go
        self._head = (torch.arange(shape.num_kv_heads, device=device) * page_size)[:, None]

    def _row_index(self, cache_index: torch.Tensor) -> torch.Tensor:
        """Rows of the flat [P * K * page, D] view for pool token indices (page * page_size + offset). [T] -> [K, T]."""
        page = cache_index.div(self.page_size, rounding_mode="floor")
        heads = self.shape.num_kv_heads
        return page * (heads * self.page_size) + self._head + (cache_index - page * self.page_size)

    def begin(self, row: PackedRow) -> None:
        """Announces the packed row of the next forward pass."""
        self.place(row.write_index)

    def place(self, write_index: torch.Tensor) -> None:
        """Announces where the next keys and values go: [T] pool token indices."""
        self._rows = self._row_index(write_index).flatten()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one layer's new keys and values, [1, K, T, D] each, into the pool."""
        head_dim = self.shape.head_dim
        self._flat_keys[layer_idx].index_copy_(0, self._rows, key_states.reshape(-1, head_dim))
        self._flat_values[layer_idx].index_copy_(0, self._rows, value_states.reshape(-1, head_dim))
        return key_states, value_states

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies tokens within the pool, all layers at once: pool token indices [n] -> [n].

        All sources are read before anything is written.
        """
        source_rows = self._row_index(source).flatten()
        target_rows = self._row_index(target).flatten()
        self._flat_keys[:, target_rows] = self._flat_keys[:, source_rows]
        self._flat_values[:, target_rows] = self._flat_values[:, source_rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given explicitly; transformers asks only to fill them in."""
        return 0


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take memory only where they are written later, if the device allows."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    num_bytes = math.prod(size) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(num_bytes + _CACHE_LINE, np.uint8))  # calloc, unlike torch.zeros
    start = -raw.data_ptr() % _CACHE_LINE
    return raw[start : start + num_bytes].view(dtype).view(size)
