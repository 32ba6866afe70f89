"""A draft head on disk: `head.json` (its shape and target) and `head.safetensors` (bf16).

Heads that come with the project lie in `pipeline/heads`, each with its model card.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pipeline.durable import fsync, replace_json
from pipeline.errors import ModelError
from pipeline.features import output_scale
from pipeline.head import DraftHead, HeadConfig
from pipeline.ranks import whole_matrices

CONFIG, WEIGHTS = "head.json", "head.safetensors"
_SHIPPED = Path(__file__).with_name("heads")


def is_head(path: str) -> bool:
    """Whether a path is a draft head's directory."""
    return (Path(path).expanduser() / CONFIG).is_file()


def shipped_head(target: str) -> Path | None:
    """The directory of the head that comes with the project for a target; None if there is none.

    Args:
        target: hash of the target, see `pipeline.models.ResolvedModel.hash`.
    """
    heads = sorted(path.parent for path in _SHIPPED.glob(f"*/{CONFIG}"))
    return next((head for head in heads if read_config(head).target == target), None)


def new_head(
    model: PreTrainedModel,
    config: HeadConfig,
    token_ids: torch.Tensor,
    matrices: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> DraftHead:
    """An untrained head over a target's embedding and output matrix, in fp32 on the target's device.

    Args:
        token_ids: [draft_vocab_size] int64, ascending.
        matrices: what `whole_matrices` gives, if it is there already.
    """
    embedding, output = matrices or whole_matrices(model)
    scale = output_scale(model)
    head = DraftHead(config, embedding, output.float(), token_ids.to(output.device), scale)
    return head.to(output.device)


def save_head(head: DraftHead, directory: Path) -> None:
    """Writes a head in bf16, each file whole or not at all; the configuration last, and the old one is gone by then.

    Raises:
        OSError: it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.to("cpu", torch.bfloat16 if value.is_floating_point() else torch.int32).contiguous()
        for name, value in head.state_dict().items()
    }
    temporary = directory / f"{WEIGHTS}.tmp"
    save_file(state, temporary)
    fsync(temporary)
    (directory / CONFIG).unlink(missing_ok=True)
    temporary.replace(directory / WEIGHTS)
    replace_json(directory / CONFIG, head.config.as_dict())


def read_config(directory: Path) -> HeadConfig:
    """The shape of a stored head.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        value: dict[str, Any] = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        return HeadConfig(**{**value, "depths": tuple(value["depths"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The draft head {str(directory)!r} cannot be read: {error}. Train it again.") from error


def check_target(directory: Path, target: str) -> HeadConfig:
    """The shape of a stored head of this target.

    Args:
        target: hash of the target, see `pipeline.models.ResolvedModel.hash`.

    Raises:
        ModelError: it was trained for another target, or cannot be read.
    """
    config = read_config(directory)
    if config.target != target:
        raise ModelError(
            f"The draft head {str(directory)!r} was trained for the target {config.target[:16]}, this one is"
            f" {target[:16]}. Train one for it, or choose another draft."
        )
    return config


def load_head(directory: Path, model: PreTrainedModel, target: str) -> DraftHead:
    """A stored head, on the device and in the dtype of its target.

    Args:
        target: hash of the target, see `pipeline.models.ResolvedModel.hash`.

    Raises:
        ModelError: it is damaged, or was trained for another target.
    """
    config = check_target(directory, target)
    matrices = whole_matrices(model)
    try:
        state = load_file(directory / WEIGHTS)
        head = new_head(model, config, state["token_ids"].long(), matrices)
        head.load_state_dict({**state, "token_ids": state["token_ids"].long()})
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise ModelError(f"The draft head {str(directory)!r} is damaged: {error}. Train it again.") from error
    head.requires_grad_(False)
    return head.to(model.dtype)
