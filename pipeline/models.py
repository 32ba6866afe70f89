"""From what the user writes after `--model` to a loaded model and tokenizer.

A name is one of the project's own models (`pipeline.embedded`), a local directory in the Hugging Face layout, a local
`.gguf` file, or a hub id. Attention and cache are the caller's affair.

    python -m pipeline.models fetch smollm2-135m      # fetch and convert now, check every byte
"""

import argparse
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.digests import files_sha256
from pipeline.embedded import EMBEDDED, EmbeddedModel, ensure_converted
from pipeline.errors import ModelError
from pipeline.ranks import check_shares, sharing_device

logger = logging.getLogger(__name__)

Quantization = Literal["none", "int8"]

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin"})
MODEL_SUFFIXES = WEIGHT_SUFFIXES | {".json", ".jinja", ".model", ".txt", ".py"}
# What transformers raises for files that are missing, broken, too large for the device or of an unknown kind.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Where a model is, and what identifies its weights.

    Attributes:
        name: what the user wrote.
        path: a local directory, or a hub id.
        revision: the hub commit; None for local files.
        hash: changes when the weights or the tokenizer do: the hub commit, or a sha256 over the local files.
        gguf_file: name of the GGUF file in `path`; None for models in the Hugging Face layout.
    """

    name: str
    path: str
    revision: str | None
    hash: str
    gguf_file: str | None = None


def resolve_model(name: str, revision: str | None = None) -> ResolvedModel:
    """Find a model without loading it; an embedded one is fetched and converted first if need be.

    Args:
        name: `smollm2-135m`, a directory, a `.gguf` file or a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: there is no such model, or `revision` is given for a model that is not on the hub.
    """
    embedded = EMBEDDED.get(name)
    path = os.path.expanduser(name)
    if embedded is None and not os.path.exists(path) and not _is_path_like(name):
        return _resolve_hub(name, revision)
    if revision is not None:
        raise ModelError(f"The revision is {revision!r}, but {name!r} is not a model on the hub; drop the revision.")
    if embedded is not None:
        directory = ensure_converted(embedded, _convert)
        return ResolvedModel(name, str(directory), None, embedded.sha256)
    return _resolve_local(name, Path(path).absolute())


def load_config(resolved: ResolvedModel, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration, without its weights.

    Raises:
        ModelError: it cannot be read, or the model is not a decoder-only one.
    """
    try:
        config = AutoConfig.from_pretrained(resolved.path, trust_remote_code=trust_remote_code, **_location(resolved))
    except _LOAD_ERRORS as error:
        raise _load_error("configuration", resolved, error) from error
    if config.is_encoder_decoder:
        raise ModelError(
            f"The model {resolved.name!r} ({config.model_type}) has an encoder; only decoder-only models are supported."
        )
    return cast(PreTrainedConfig, config)


def load_tokenizer(resolved: ResolvedModel, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, chat template included where the model has one.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolved.path, trust_remote_code=trust_remote_code, **_location(resolved)
        )
    except _LOAD_ERRORS as error:
        raise _load_error("tokenizer", resolved, error) from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_causal_lm(
    resolved: ResolvedModel,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device | str,
    *,
    trust_remote_code: bool = False,
    quantization: Quantization = "none",
    num_ranks: int = 1,
) -> PreTrainedModel:
    """The model on `device`, in eval mode (as `from_pretrained` leaves it), without gradients.

    Args:
        dtype: of the weights; `auto` takes what the checkpoint says.
        device: `auto` spreads the layers evenly over all GPUs there are (accelerate's device map).
        quantization: `int8` keeps the weights of linear layers in 8 bits, with a scale for each output (torchao).
        num_ranks: processes that share it, all of which must load it, see `pipeline.ranks`; the device is then theirs.

    Raises:
        ModelError: it cannot be loaded, is not decoder-only, its files lack some of its weights, its heads cannot be
            shared by so many, or what is asked for needs something that is not there.
    """
    config = load_config(resolved, trust_remote_code=trust_remote_code)
    arguments: dict[str, Any] = {"dtype": dtype}
    if num_ranks > 1:
        check_shares(config.get_text_config(), num_ranks)
        arguments["distributed_config"] = _shared_config(resolved, quantization, num_ranks, device)
    else:
        arguments["device_map"] = "auto" if device == "auto" else {"": device}
    if quantization == "int8":
        arguments["quantization_config"] = _int8_config(resolved, config)
    if resolved.gguf_file is not None:
        arguments["quantization_config"] = _gguf_config()
    else:
        arguments["config"] = config
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            resolved.path,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **arguments,
            **_location(resolved),
        )
    except _LOAD_ERRORS as error:
        raise _load_error("model", resolved, error) from error
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    # transformers fills what a checkpoint lacks with random numbers and only warns.
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"The files of {resolved.name!r} lack {len(missing)} weights of a {config.model_type} model, "
            f"{missing[0]!r} first. Is this a complete causal language model?"
        )
    model.requires_grad_(False)
    return model


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex sha256 over the vocabulary and the special tokens.

    Models whose tokenizers agree in it can share a datastore and draft for each other.
    """
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    special = sorted(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    text = json.dumps([vocabulary, special], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _is_path_like(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.endswith((".gguf", os.sep)) or name.count("/") > 1


def _resolve_local(name: str, path: Path) -> ResolvedModel:
    """A directory in the Hugging Face layout, or a GGUF file."""
    if not os.path.exists(path):  # unlike Path.exists, False for over-long names too
        raise ModelError(f"The model path {name!r} does not exist; {_known_names(name)}")
    if path.is_file() and path.suffix == ".gguf":
        return ResolvedModel(name, str(path.parent), None, files_sha256([path]), gguf_file=path.name)
    if not path.is_dir():
        raise ModelError(f"The model path {name!r} is a file, and not a .gguf file; give the model's directory.")
    files = [file for file in path.iterdir() if file.is_file() and file.suffix in MODEL_SUFFIXES]
    if not (path / "config.json").is_file():
        raise ModelError(
            f"The directory {name!r} holds no config.json, so it is no model in the Hugging Face layout. "
            "Give the directory that save_pretrained wrote, or the path of a .gguf file."
        )
    if not any(file.suffix in WEIGHT_SUFFIXES for file in files):
        raise ModelError(f"The directory {name!r} holds a config.json but no *.safetensors or *.bin weights.")
    return ResolvedModel(name, str(path), None, files_sha256(files))


def _resolve_hub(name: str, revision: str | None) -> ResolvedModel:
    """The commit a hub id stands for; one small request, answered from the local cache when offline."""
    try:
        config = hf_hub_download(name, "config.json", revision=revision)
    except GatedRepoError as error:
        raise ModelError(
            f"The hub model {name!r} asks for consent: accept its terms on its page, then log in with `hf auth login`."
        ) from error
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"The model {name!r}{at} is neither a local path nor a model this machine can fetch from the hub "
            f"({_first_line(error)}); {_known_names(name)}"
        ) from error
    commit = Path(config).parent.name
    return ResolvedModel(name, name, commit, commit)


def _known_names(name: str) -> str:
    near = get_close_matches(Path(name).name, EMBEDDED, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Give an existing directory, a .gguf file, a hub id (owner/name) or one of: {', '.join(EMBEDDED)}."


def _location(resolved: ResolvedModel) -> dict[str, str]:
    """Arguments of `from_pretrained` that say which files to take."""
    chosen = {"revision": resolved.revision, "gguf_file": resolved.gguf_file}
    return {key: value for key, value in chosen.items() if value is not None}


def _load_error(what: str, resolved: ResolvedModel, error: Exception) -> ModelError:
    remedy = (
        "Read its code, then allow it with --trust-remote-code."
        if "trust_remote_code" in str(error)
        else "It may lack a plan for sharing; leave out --tensor-parallel."
        if "tp_plan" in str(error)
        else "Check that the files are complete and that this version of transformers knows the architecture."
    )
    return ModelError(f"The {what} of {resolved.name!r} cannot be loaded: {_first_line(error)} {remedy}")


def _gguf_config() -> object:
    try:
        from transformers import GgufConfig
    except ImportError as error:  # before transformers 5.18
        raise ModelError(
            "Reading GGUF files needs transformers 5.18 or newer; upgrade it, or give a directory of safetensors."
        ) from error
    return GgufConfig(dequantize=True)


def _int8_config(resolved: ResolvedModel, config: PreTrainedConfig) -> object:
    """Has linear layers but the last kept in 8 bits; activations are not touched, so no row depends on another."""
    if resolved.gguf_file is not None or getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"The weights of {resolved.name!r} are quantised already; leave out --quantization int8, or give full ones."
        )
    try:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    except (ImportError, ValueError) as error:  # ValueError: transformers wants a newer one
        raise ModelError(
            f"--quantization int8 needs torchao, which cannot be used ({_first_line(error)}). Install it on every"
            " node: pip install '.[int8]'."
        ) from error


def _shared_config(
    resolved: ResolvedModel, quantization: Quantization, num_ranks: int, device: torch.device | str
) -> object:
    if resolved.gguf_file is not None or quantization != "none":
        raise ModelError(
            f"Processes can share full weights only, and {resolved.name!r} has "
            f"{'a GGUF file' if resolved.gguf_file is not None else '--quantization ' + quantization}; leave out"
            " --tensor-parallel, or give a directory of safetensors."
        )
    if torch.device(device).type != sharing_device():
        raise ModelError(
            f"transformers shares models on {sharing_device()} alone with this build of PyTorch, not on {device}; leave"
            " out --tensor-parallel."
        )
    try:
        from transformers import distributed

        return cast(Any, distributed).DistributedConfig(tp_size=num_ranks)
    except (ImportError, AttributeError, TypeError) as error:
        raise ModelError(
            "Sharing a model among processes needs a newer transformers, whose DistributedConfig has tp_size; upgrade"
            " it, or leave out --tensor-parallel."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _convert(gguf: Path, into: Path, embedded: EmbeddedModel) -> None:
    """Write a GGUF file's model, dequantised, in the Hugging Face layout.

    fp32 is the smallest float type that holds every dequantised value: a 4-bit code times an fp16 scale plus an fp16
    offset. A cast to fp16 would change 3 values in 10, to bf16 3 in 4.
    """
    source = ResolvedModel(embedded.name, str(gguf.parent), None, embedded.sha256, gguf_file=gguf.name)
    model = load_causal_lm(source, torch.float32, "cpu")
    model.generation_config = GenerationConfig.from_dict(
        {
            "bos_token_id": model.config.bos_token_id,
            "eos_token_id": list(embedded.eos_token_ids),
            "pad_token_id": model.config.pad_token_id,
        }
    )
    model.save_pretrained(into)
    load_tokenizer(source).save_pretrained(into)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module; exit code 2 when the model cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.models", description="Fetch the project's own models.")
    commands = parser.add_subparsers(required=True)
    fetch = commands.add_parser("fetch", help="fetch and convert a model if need be, and check every byte of it")
    fetch.add_argument("name", choices=sorted(EMBEDDED))
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        logger.info("%s is in %s.", parsed.name, ensure_converted(EMBEDDED[parsed.name], _convert, is_deep=True))
    except ModelError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
