"""The target model: any transformers decoder with standard attention, run over packed rows and the paged cache.

No modelling file is forked. The model's own code runs; our `Cache` stores keys and values in pages, our attention
function reads them. What the model cannot be is checked once, at load.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from pipeline import graphs
from pipeline.attention import IMPLEMENTATION, AttentionContext, can_be_static
from pipeline.errors import ModelError
from pipeline.features import FeatureTap
from pipeline.kv_cache import KVShape, PagedCache
from pipeline.packing import PackedRow, Runs, pack, short_first
from pipeline.ranks import Build, Move, Pass, Ranks
from pipeline.static_pass import Outputs, StaticPasses

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class Forward:
    """Logits of one packed forward pass.

    Attributes:
        logits: [M, V], rows of each run contiguous: the root's, then its tree nodes', those done before left out.
        begin: [S] int64 for each run in the order given, its first row in `logits`; -1 for runs that wanted none.
        states: [T, 3 H] hidden states of all nodes, run by run, if a drafter reads them.
        state_begin: [S] int64 for each run in the order given, its first row in `states`.
    """

    logits: torch.Tensor
    begin: np.ndarray
    states: torch.Tensor | None = None
    state_begin: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


class Target:
    """A loaded target over a KV pool of `num_pages` pages.

    Attributes:
        is_shared: by several processes, which must do the same passes.

    Args:
        num_slots: most sequences in a pass of fixed size.
        is_static: run passes of fixed sizes, see `pipeline.static_pass`; None where that is faster, on a GPU.
        ranks: the processes that share the model; None if it is whole.

    Raises:
        ModelError: the architecture is not supported; says which part.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_pages: int,
        page_size: int,
        num_slots: int = 128,
        *,
        is_static: bool | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks
        self.is_shared = ranks is not None
        self._tell(Build(num_pages, page_size, num_slots, is_static))
        self.config = model.config.get_text_config()
        self.model = model
        self.device: torch.device = model.device
        shape = kv_shape(model)
        self.num_pages = num_pages
        self.cache = PagedCache(shape, num_pages + 1, page_size, self.device)  # the last page is nobody's
        self._is_split = bool(shape.devices)
        self.tap: FeatureTap | None = None
        model.set_attn_implementation(IMPLEMENTATION)
        self._passes: StaticPasses | None = None
        pays = graphs.pays(self.device) and can_be_static(self.device)
        if not self._is_split and (pays if is_static is None else is_static):
            num_ranks = 1 if ranks is None else ranks.size
            self._passes = StaticPasses(model, self.cache, lambda: self.tap, num_slots, num_ranks)

    def read_states(self, depths: Sequence[int]) -> None:
        """Has every forward pass return the hidden states of these decoder layers."""
        self.tap = FeatureTap(self.model, depths)
        if self._passes is not None:
            self._passes.reset()

    @torch.inference_mode()
    def forward(self, runs: Runs) -> Forward:
        """One forward pass over all runs. Their keys and values are in the cache afterwards, accepted or not."""
        self._tell(Pass(runs))
        ordered, order, num_short = short_first(runs)
        num_logits, num_computed = ordered.num_logits, ordered.num_computed
        logits, states = self._run(ordered, num_short)
        logits, states = logits[: num_logits.sum()], None if states is None else states[: num_computed.sum()]
        begins = _begins(num_logits), _begins(num_computed)
        if order is not None:
            for each in begins:
                each[order] = each.copy()
        return Forward(logits, np.where(runs.wants_logits, begins[0], -1), states, begins[1])

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies tokens within the cache, pool token indices [n] -> [n] int64; all are read before any is written."""
        self._tell(Move(source, target))
        self.cache.move(*torch.from_numpy(np.stack([source, target])).to(self.device))

    def _tell(self, order: Build | Pass | Move) -> None:
        if self._ranks is not None:
            self._ranks.tell(order)

    def _run(self, runs: Runs, num_short: int) -> Outputs:
        """Logits, and states if they are read, of runs in order; there may be padding behind them."""
        if self._passes is not None:
            outputs = self._passes.run(runs)
            if outputs is not None:
                return outputs
        row = PackedRow(pack(runs, num_short, self.cache.page_size), self.device)
        self.cache.begin(row)
        output = self.model(
            input_ids=row.token_ids,
            position_ids=row.position_ids,
            past_key_values=self.cache,
            use_cache=True,
            # A list works wherever the last layer is; a tensor would be on the first one's device.
            logits_to_keep=row.logits_index.tolist() if self._is_split else row.logits_index,
            packed=AttentionContext(row, self.cache),
        )
        states = None if self.tap is None else self.tap.take()[0].to(self.device)
        return output.logits[0].to(self.device), states


def _begins(counts: np.ndarray) -> np.ndarray:
    """[S] where each of parts of these sizes begins."""
    begins: np.ndarray = np.cumsum(counts) - counts
    return begins


def kv_shape(model: PreTrainedModel) -> KVShape:
    """Layers, heads and head dimension of the KV cache, read off a two-token forward pass.

    Raises:
        ModelError: recurrent or shared layers, layers of different shapes, or key and value dimensions that differ.
    """
    name = model.config.model_type
    _check_attention(model)
    if model.config._attn_implementation == IMPLEMENTATION:  # from an earlier target; ours needs what it has not yet
        model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(
            input_ids=torch.zeros((1, 2), dtype=torch.int64, device=model.device), past_key_values=cache, use_cache=True
        )
    shapes, devices = set(), []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.shape != values.shape:
            raise ModelError(
                f"Target of type {name!r} has a layer without plain keys and values; choose another target."
            )
        shapes.add((keys.shape[1], keys.shape[3], keys.dtype))
        devices.append(keys.device)
    num_layers = model.config.get_text_config().num_hidden_layers
    if len(cache.layers) != num_layers or len(shapes) != 1:
        raise ModelError(
            f"Target of type {name!r} has {len(cache.layers)} cached layers of {len(shapes)} shapes for {num_layers} "
            "layers; only models whose layers all keep keys and values of one shape are supported."
        )
    heads, head_dim, dtype = shapes.pop()
    return KVShape(num_layers, heads, head_dim, dtype, tuple(devices) if len(set(devices)) > 1 else ())


def _check_attention(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    name = model.config.model_type
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(
            f"Target of type {name!r} does not use transformers' attention interface and cannot verify trees."
        )
    unknown = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if unknown:
        raise ModelError(
            f"Target of type {name!r} has layers of type {sorted(unknown)}; supported: {sorted(_LAYER_TYPES)}."
        )
    if getattr(config, "attention_chunk_size", None):
        raise ModelError(f"Target of type {name!r} uses chunked attention, which is not supported.")


def max_context_of(model: PreTrainedModel) -> int:
    """Longest sequence, in tokens, at which the model's positions are its own.

    Rotary embeddings that depend on the longest sequence of the batch stay within the length where they do not.
    """
    config = model.config.get_text_config()
    longest = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            longest = min(longest, int(parameters.get("original_max_position_embeddings", longest)))
    return longest
