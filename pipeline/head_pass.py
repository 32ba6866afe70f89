"""The passes of a draft head: one layer over its paged cache, where it pays captured as CUDA graphs of fixed sizes.

What a pass reads of the tokens before, and what it leaves for the next one, stays in a table on the device.
"""

import numpy as np
import torch

from pipeline import graphs
from pipeline.attention import AttentionContext, can_be_static, rasd_attention
from pipeline.graphs import Graphs
from pipeline.growth import top_of
from pipeline.head import DraftHead
from pipeline.kv_cache import PagedCache
from pipeline.packing import PackedRow, Runs, pack
from pipeline.static_row import Size, StaticRow

Outputs = tuple[torch.Tensor, torch.Tensor]


class _Layer(torch.nn.Module):
    """What the attention function asks of its module."""

    layer_idx = 0


class HeadPasses:
    """Computes nodes.

    Attributes:
        features: [R + 2, H] the table; its first rows are the caller's.
        is_static: whether passes have fixed sizes.

    Args:
        cache: whose last page belongs to nobody.
        num_features: rows R of the table that the caller uses.
        num_slots: most trees in a pass.
        branches: likeliest tokens wanted of each node.
        is_static: run passes of fixed sizes; None where that is faster, on a GPU.
    """

    def __init__(
        self,
        head: DraftHead,
        cache: PagedCache,
        num_features: int,
        num_slots: int,
        branches: int,
        *,
        is_static: bool | None = None,
    ) -> None:
        self._head = head
        config = head.config
        self._branches = min(branches, config.draft_vocab_size)
        self._cache = cache
        self._layer = _Layer()
        device = cache.device
        # Padding reads the row behind the caller's, always zero, and writes the last.
        self.features = torch.zeros(num_features + 2, config.hidden_size, dtype=cache.shape.dtype, device=device)
        self._row: StaticRow | None = None
        pays = graphs.pays(device) and can_be_static(device)
        self.is_static = pays if is_static is None else is_static
        if self.is_static:
            fold, fills = config.num_heads // config.num_kv_heads, (num_features, num_features + 1)
            self._row = StaticRow(fold, cache.last_page, device, num_slots, has_windows=False, fills=fills)
            self._graphs: Graphs[Size, Outputs] = Graphs(self._static_pass, device)

    def run(self, runs: Runs, places: np.ndarray) -> Outputs:
        """Of all nodes that are computed, run by run: float32 logits [M, D], and `top_of` these; valid until the next.

        Args:
            places: [2, M] int64 rows of the table: with the feature of the token before each node, and where the
                layer's output for it goes.
        """
        num_nodes = places.shape[1]
        page_size = self._cache.page_size
        if self._row is not None and (size := self._row.put(runs, page_size, places)) is not None:
            found = self._graphs(size)
            self._row.was_used()
            if found is not None:
                logits, top = found
                return logits[:num_nodes], top[:num_nodes]
        row = PackedRow(pack(runs, len(runs), page_size), self._cache.device)
        context, on_device = AttentionContext(row, self._cache), torch.from_numpy(places).to(self._cache.device)
        return self._pass(row.token_ids[0], row.position_ids[0], row.write_index, on_device, context)

    def _static_pass(self, size: Size) -> Outputs:
        assert self._row is not None
        self._row.fetch(size)
        token_ids, positions, write_index, _ = self._row.ids(size)
        context = AttentionContext(None, self._cache, self._row.tiles(size))
        return self._pass(token_ids, positions, write_index, self._row.further(size), context)

    def _pass(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        write_index: torch.Tensor,
        places: torch.Tensor,  # [2, M] rows of the table to read and to write
        context: AttentionContext,
    ) -> Outputs:
        features = self.features[places[0]]
        inputs = self._head.inputs(token_ids, features)
        query, key, value = self._head.heads(inputs, positions)
        self._cache.place(write_index)
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))  # [1, heads, C, D]
        self._cache.update(key, value, 0)
        attended, _ = rasd_attention(self._layer, query, key, value, None, packed=context)
        hidden = self._head.close(self._head.residual(inputs, features), attended[0].flatten(1))
        self.features.index_copy_(0, places[1], hidden)
        logits = self._head.logits(hidden).float()
        return logits, top_of(logits, self._branches, self._head.token_ids)
