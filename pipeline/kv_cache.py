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
    """What one token costs: `num_layers` x 2 x K heads x D numbers of `dtype`.

    Attributes:
        devices: of each layer, where a model is spread over several; else empty.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class _Pool:
    """Keys and values of the layers on one device, [layers, P, K, page, D] each and one behind the other."""

    def __init__(self, shape: KVShape, num_layers: int, num_pages: int, page_size: int, device: torch.device) -> None:
        size = (2, num_layers, num_pages, shape.num_kv_heads, page_size, shape.head_dim)
        self.keys, self.values = both = _zeros(size, shape.dtype, device)
        self._flat = both.view(2 * num_layers, -1, shape.head_dim)
        self.flat_keys, self.flat_values = self._flat.chunk(2)
        self.rows = torch.empty(0, dtype=torch.int64, device=device)  # [K * T] where the current row's tokens go
        self._device = device
        self._page_size = page_size
        self._page_rows = shape.num_kv_heads * page_size
        self._head = (torch.arange(shape.num_kv_heads, device=device) * page_size)[:, None]

    def row_index(self, cache_index: torch.Tensor) -> torch.Tensor:
        """Rows of the flat [P * K * page, D] view for pool token indices (page * page_size + offset), [K * T]."""
        cache_index = cache_index.to(self._device)
        page = cache_index.div(self._page_size, rounding_mode="floor")
        return (page * self._page_rows + self._head + (cache_index - page * self._page_size)).flatten()

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        rows = self.row_index(torch.cat([source, target])).view(len(self._head), 2, -1)
        moved = self._flat.index_select(1, rows[:, 0].flatten())
        self._flat.index_copy_(1, rows[:, 1].flatten(), moved)


class PagedCache(Cache):
    """Keys and values of each layer, [P, K, page, D]; a forward pass writes where its `PackedRow` says.

    Zeroed at first: padding gathered past a sequence's end is multiplied by zero and must be finite.
    """

    def __init__(self, shape: KVShape, num_pages: int, page_size: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.shape = shape
        self.device = device
        self.num_pages = num_pages
        self.page_size = page_size
        devices = shape.devices or (device,) * shape.num_layers
        self._pools = {each: _Pool(shape, devices.count(each), num_pages, page_size, each) for each in set(devices)}
        # Of each layer its pool and its number there.
        self._layers = [(self._pools[each], devices[:i].count(each)) for i, each in enumerate(devices)]
        self.keys = [pool.keys[i] for pool, i in self._layers]
        self.values = [pool.values[i] for pool, i in self._layers]

    @property
    def last_page(self) -> int:
        """Pool token index where the last page begins, which whoever pads rows leaves to nobody."""
        return (self.num_pages - 1) * self.page_size

    def begin(self, row: PackedRow) -> None:
        """Announces the packed row of the next forward pass."""
        self.place(row.write_index)

    def place(self, write_index: torch.Tensor) -> None:
        """Announces where the next keys and values go: [T] pool token indices."""
        for pool in self._pools.values():
            pool.rows = pool.row_index(write_index)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one layer's new keys and values, [1, K, T, D] each, into its pool."""
        head_dim = self.shape.head_dim
        pool, layer = self._layers[layer_idx]
        pool.flat_keys[layer].index_copy_(0, pool.rows, key_states.reshape(-1, head_dim))
        pool.flat_values[layer].index_copy_(0, pool.rows, value_states.reshape(-1, head_dim))
        return key_states, value_states

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies tokens within the pools, all layers at once: pool token indices [n] -> [n].

        All sources are read before anything is written.
        """
        for pool in self._pools.values():
            pool.move(source, target)

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
