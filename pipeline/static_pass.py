"""Target passes of a few fixed sizes, each captured once as a CUDA graph where there is CUDA."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.attention import AttentionContext
from pipeline.features import FeatureTap
from pipeline.graphs import Graphs, has_compiler
from pipeline.kv_cache import PagedCache
from pipeline.packing import Runs
from pipeline.static_row import Size, StaticRow

Outputs = tuple[torch.Tensor, torch.Tensor | None]
# Ends of the names of modules that hold most of a model's element-wise kernels; what processes share has waits inside.
_FUSED, _FUSED_SHARED = ("RMSNorm", "MLP"), ("RMSNorm",)


class StaticPasses:
    """The passes of one target.

    Args:
        cache: whose last page belongs to nobody.
        tap: of the hidden states that a drafter reads, as it is at each capture.
        num_runs: most sequences in a pass.
        num_ranks: how many processes share the model's heads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        tap: Callable[[], FeatureTap | None],
        num_runs: int,
        num_ranks: int = 1,
    ) -> None:
        config: Any = model.config.get_text_config()
        self._model = model
        if model.device.type == "cuda" and has_compiler():
            for module in model.modules():
                if type(module).__name__.endswith(_FUSED if num_ranks == 1 else _FUSED_SHARED):
                    module.compile(dynamic=True)
        self._cache = cache
        self._tap = tap
        self._row = StaticRow(
            _query_heads_a_kv_head(config, cache, num_ranks),
            cache.last_page,
            model.device,
            num_runs,
            has_windows=getattr(config, "sliding_window", None) is not None,
        )
        self._graphs: Graphs[Size, Outputs] = Graphs(self._pass, model.device)

    def run(self, runs: Runs) -> Outputs | None:
        """Logits, and states if they are read, of these runs and of padding behind them; valid until the next pass.

        None if there is no room for them, or if the model's code cannot be captured.
        """
        size = self._row.put(runs, self._cache.page_size)
        outputs = None if size is None else self._graphs(size)
        self._row.was_used()
        assert outputs is None or (outputs[1] is None) == (self._tap() is None)
        return outputs

    def reset(self) -> None:
        """What is read of the model has changed."""
        self._graphs = Graphs(self._pass, self._model.device)

    def _pass(self, size: Size) -> Outputs:
        self._row.fetch(size)
        token_ids, positions, write_index, logits_index = self._row.ids(size)
        self._cache.place(write_index)
        output = self._model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_index,
            packed=AttentionContext(None, self._cache, self._row.tiles(size)),
        )
        tap = self._tap()
        return output.logits[0], None if tap is None else tap.take()[0]


def _query_heads_a_kv_head(config: Any, cache: PagedCache, num_ranks: int) -> int:
    """By the configuration where processes share the model: each may have some of its heads, or all."""
    num_heads = int(config.num_attention_heads)
    if num_ranks == 1:
        return num_heads // cache.shape.num_kv_heads
    return num_heads // int(getattr(config, "num_key_value_heads", None) or num_heads)
