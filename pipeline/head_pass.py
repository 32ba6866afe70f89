"""The passes of a draft head: one layer over its paged cache, where it pays captured as CUDA graphs of fixed sizes."""

import torch

from pipeline import graphs
from pipeline.attention import AttentionContext, can_be_static, rasd_attention
from pipeline.graphs import SIZES, Graphs
from pipeline.growth import top_of
from pipeline.head import DraftHead
from pipeline.kv_cache import PagedCache
from pipeline.packing import Run, pack
from pipeline.static_row import Size, StaticRow

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Layer(torch.nn.Module):
    """What the attention function asks of its module."""

    layer_idx = 0


class HeadPasses:
    """Computes nodes.

    Args:
        cache: whose last page belongs to nobody.
        num_slots: most trees in a pass.
        branches: likeliest tokens wanted of each node.
        is_static: run passes of fixed sizes; None where that is faster, on a GPU.
    """

    def __init__(
        self, head: DraftHead, cache: PagedCache, num_slots: int, branches: int, *, is_static: bool | None = None
    ) -> None:
        self._head = head
        self._branches = min(branches, head.config.draft_vocab_size)
        self._cache = cache
        self._layer = _Layer()
        self._device = cache.device
        self._row: StaticRow | None = None
        pays = graphs.pays(self._device) and can_be_static(self._device)
        if pays if is_static is None else is_static:
            config = head.config
            fold = config.num_heads // config.num_kv_heads
            self._row = StaticRow(fold, cache.last_page, self._device, num_slots, has_windows=False)
            self._features = torch.zeros(SIZES[-1], config.hidden_size, dtype=cache.shape.dtype, device=self._device)
            self._graphs: Graphs[Size, Outputs] = Graphs(self._static_pass, self._device)

    def run(self, runs: list[Run], features: torch.Tensor) -> Outputs:
        """Of all nodes that are computed, run by run: the layer's output [M, H], float32 logits [M, D], `top_of` these.

        Args:
            features: [M, H] of the token before each.
        """
        page_size = self._cache.page_size
        if self._row is not None:
            row = pack(runs, len(runs), page_size, torch.device("cpu"))
            if (size := self._row.put(row)) is not None:
                self._features[: len(features)] = features
                outputs = self._graphs(size)
                self._row.was_used()
                if outputs is not None:
                    hidden, logits, top = (output[: len(features)] for output in outputs)
                    # The next level's features come from this one's output, which the next pass writes over.
                    return hidden.clone(), logits, top
        row = pack(runs, len(runs), page_size, self._device)
        context = AttentionContext(row, self._cache)
        return self._pass(row.token_ids[0], row.position_ids[0], row.write_index, features, context)

    def _static_pass(self, size: Size) -> Outputs:
        assert self._row is not None
        self._row.fetch(size)
        token_ids, positions, write_index, _ = self._row.ids(size)
        context = AttentionContext(None, self._cache, self._row.tiles(size))
        return self._pass(token_ids, positions, write_index, self._features[: size.num_rows], context)

    def _pass(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        write_index: torch.Tensor,
        features: torch.Tensor,
        context: AttentionContext,
    ) -> Outputs:
        inputs = self._head.inputs(token_ids, features)
        query, key, value = self._head.heads(inputs, positions)
        self._cache.place(write_index)
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))  # [1, heads, C, D]
        self._cache.update(key, value, 0)
        attended, _ = rasd_attention(self._layer, query, key, value, None, packed=context)
        hidden = self._head.close(self._head.residual(inputs, features), attended[0].flatten(1))
        logits = self._head.logits(hidden).float()
        return hidden, logits, top_of(logits, self._branches, self._head.token_ids)
