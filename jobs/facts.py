"""What the driver must know of the target without loading its weights: identity, and how much memory it will take."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from jobs.backend import AUTO_DTYPE, SHIPPED, most_slots
from jobs.config import GenerateConfig
from jobs.plan import MemoryEstimate, ModelFacts
from pipeline.errors import ConfigError, ModelError
from pipeline.head_files import check_target, is_head, shipped_head
from pipeline.models import load_config, load_tokenizer, resolve_model, tokenizer_hash

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ModelOptions(Protocol):
    """Options that name a target and what drafts for it."""

    @property
    def model(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def draft(self) -> str | None: ...


def model_facts(config: ModelOptions) -> ModelFacts:
    """Resolve the target and its tokenizer.

    Raises:
        ModelError: there is no such model, or its tokenizer cannot be loaded.
    """
    resolved = resolve_model(config.model, config.revision)
    tokenizer = load_tokenizer(resolved, trust_remote_code=config.trust_remote_code)
    template = tokenizer.chat_template
    return ModelFacts(
        name=resolved.name,
        revision=resolved.revision,
        weights=resolved.hash,
        tokenizer=tokenizer_hash(tokenizer),
        chat_template=None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
    )


def has_draft(config: ModelOptions, facts: ModelFacts) -> bool:
    """Whether there is a draft for the target: the one that `--draft` names, or without it a shipped head.

    Raises:
        ConfigError: `head` is a directory, too.
        ModelError: what `--draft` names cannot be resolved or does not fit: a head of another target, a model whose
            token ids mean something else than the target's.
    """
    if config.draft is None:
        return shipped_head(facts.weights) is not None
    _check_draft(config.draft, config, facts)
    return True


def _check_draft(name: str, config: ModelOptions, facts: ModelFacts) -> None:
    if name == SHIPPED:
        if is_head(name):
            raise ConfigError(f"--draft is {name!r}, the head that comes with rasd; for the directory write ./{name}.")
        if shipped_head(facts.weights) is None:
            raise ModelError(
                f"--draft is {name!r}, but no head comes with rasd for --model {config.model}. Train one with"
                " `rasd train-draft` and give its directory, or name a draft model."
            )
        return
    if is_head(name):
        check_target(Path(name).expanduser(), facts.weights)
        return
    tokenizer = load_tokenizer(resolve_model(name), trust_remote_code=config.trust_remote_code)
    if (found := tokenizer_hash(tokenizer)) != facts.tokenizer:
        raise ModelError(
            f"--draft {name} has tokenizer {found[:16]}, --model {config.model} has {facts.tokenizer[:16]}; a draft"
            " model must have the target's. Choose one of the same family."
        )


def vocab_size(config: GenerateConfig) -> int:
    """Token ids of the target are below it; see `model_facts` for errors."""
    resolved = resolve_model(config.model, config.revision)
    text = load_config(resolved, trust_remote_code=config.trust_remote_code).get_text_config()
    return int(text.vocab_size)


def estimate_memory(config: GenerateConfig) -> MemoryEstimate:
    """Memory of a replica from the model's configuration alone; see `model_facts` for errors."""
    resolved = resolve_model(config.model, config.revision)
    model = load_config(resolved, trust_remote_code=config.trust_remote_code)
    dtype = config.dtype if config.dtype != "auto" else AUTO_DTYPE[_auto_device(config)]
    text: PreTrainedConfig = model.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * kv_heads * head_dim * _BYTES[dtype]
    longest = text.max_position_embeddings if config.max_context == "auto" else config.max_context
    slots = most_slots(config, _auto_device(config))
    from_config = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            shell = from_config(model, trust_remote_code=config.trust_remote_code)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ModelError(f"--model is {config.model!r}; it is no causal language model: {error}") from error
    return MemoryEstimate(
        dtype=dtype,
        max_context=longest,
        weights=_weight_bytes(shell, _BYTES[dtype], is_int8=config.quantization == "int8"),
        kv_per_token=per_token,
        slots=slots,
        kv=per_token * longest * slots,
    )


def _weight_bytes(shell: PreTrainedModel, each: int, *, is_int8: bool) -> int:
    """Bytes of a model's parameters; in 8 bits those of its linear layers but the last, scales not counted."""
    untyped: Any = shell
    last = untyped.get_output_embeddings()
    linear = [module for module in shell.modules() if isinstance(module, torch.nn.Linear) and module is not last]
    small = {id(module.weight) for module in linear} if is_int8 else set()
    return sum(parameter.numel() * (1 if id(parameter) in small else each) for parameter in shell.parameters())


def _auto_device(config: GenerateConfig) -> str:
    is_on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return "cuda" if is_on_gpu else "cpu"
