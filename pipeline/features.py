"""Hidden states of a target at some depths, taken while its own code runs.

Works on any transformers decoder whose layers are a ModuleList under `layers`; no modelling file is touched.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import ModelError


class FeatureTap:
    """Keeps the outputs of decoder layers of the newest forward pass.

    Args:
        depths: layer numbers.

    Raises:
        ModelError: the model's decoder layers cannot be found.
    """

    def __init__(self, model: PreTrainedModel, depths: Sequence[int]) -> None:
        layers = _layers(model)
        if max(depths) >= len(layers):
            raise ModelError(f"The head reads layer {max(depths)}, but the target has {len(layers)} layers.")
        self._states: dict[int, torch.Tensor] = {}
        self._depths = tuple(depths)
        self._hooks = [layers[depth].register_forward_hook(self._keeper(depth)) for depth in set(self._depths)]

    def take(self) -> torch.Tensor:
        """[..., 3 H] the states of the newest pass, side by side; each pass's can be taken once."""
        device = self._states[self._depths[0]].device  # of a model spread over several, the first layer's read
        states = torch.cat([self._states[depth].to(device) for depth in self._depths], dim=-1)
        self._states.clear()
        return states

    def close(self) -> None:
        """Stops listening."""
        for hook in self._hooks:
            hook.remove()

    def _keeper(self, depth: int) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._states[depth] = output[0] if isinstance(output, tuple) else output

        return keep


@torch.no_grad()
def output_scale(model: PreTrainedModel) -> torch.Tensor | None:
    """[H] float32 weight of the norm between the last layer and the output matrix; None if there is none to be found.

    Measured, not read: some models store it as a difference from one.
    """
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    norm = getattr(decoder, "norm", None) or getattr(decoder, "final_layernorm", None)
    if not isinstance(norm, nn.Module):
        return None
    size = int(model.config.get_text_config().hidden_size)
    signs = torch.ones(size, device=model.device, dtype=model.dtype)
    signs[::2] = -1.0  # mean 0, root mean square 1
    scaled: torch.Tensor = norm(signs) - norm(torch.zeros_like(signs))
    return scaled.float() * signs.float()


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"The decoder layers of a {model.config.model_type} model are not where a draft head looks for them; use a"
            " draft model instead."
        )
    return layers
