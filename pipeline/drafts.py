"""What drafts for a target by name: the head shipped for it, a head in a directory, or any model."""

from pathlib import Path

from transformers import PreTrainedModel

from pipeline.errors import ModelError
from pipeline.head import DraftHead
from pipeline.head_files import is_head, load_head, shipped_head
from pipeline.models import ResolvedModel, load_causal_lm, resolve_model


def load_draft(
    name: str | None, model: PreTrainedModel, target: ResolvedModel, *, trust_remote_code: bool = False
) -> PreTrainedModel | DraftHead:
    """A draft for a loaded target, on its device and in its dtype.

    Args:
        name: a model, or directory of a head; None is the head shipped for the target.

    Raises:
        ModelError: there is none, it cannot be loaded, or it is a head of another target.
    """
    if name is None:
        head = shipped_head(target.hash)
        if head is None:
            raise ModelError(f"No draft head for {target.name} comes with this copy of rasd; give --draft.")
        return load_head(head, model, target.hash)
    if is_head(name):
        return load_head(Path(name), model, target.hash)
    return load_causal_lm(resolve_model(name), model.dtype, model.device, trust_remote_code=trust_remote_code)
