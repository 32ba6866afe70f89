"""A target that is ready to generate rows: its engine, tokenizer and sources, loaded as a `ReplicaConfig` says."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from actors.followers import Followers
from actors.load_lock import load_lock
from actors.metrics import ReplicaMetrics
from actors.replica_config import ReplicaConfig
from actors.rows import InputRow, RowFailure
from actors.sources import Sources, open_sources
from pipeline.assemble import EngineOptions, build_engine
from pipeline.drafts import load_draft
from pipeline.engine import Engine
from pipeline.errors import ConfigError, RowError
from pipeline.head_files import is_head
from pipeline.methods import method_named
from pipeline.models import load_causal_lm, load_tokenizer, resolve_model
from pipeline.prompts import encode_messages, encode_prompt
from pipeline.ranks import Gather
from pipeline.request import Generation, SamplingParams


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load` made.

    Attributes:
        name: the target, as the user wrote it.
        sources: None if the method searches nothing outside the request.
        notes: one line each, for the user: what the method lacks, which fallback was taken.
        followers: the other processes that share the target; None if there are none.
    """

    name: str
    device: str
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    sources: Sources | None
    notes: tuple[str, ...]
    followers: Followers | None = None

    def encode(self, row: InputRow) -> tuple[RowFailure | None, tuple[int, ...]]:
        """The row's prompt as token ids, or why there are none."""
        if row.error is not None:
            return row.error, ()
        try:
            if row.messages is not None:
                return None, encode_messages(self.tokenizer, row.messages)
            assert row.prompt is not None
            return None, encode_prompt(self.tokenizer, row.prompt)
        except RowError as error:
            return RowFailure(error.error_type, str(error)), ()

    def passages(self, rows: Sequence[InputRow]) -> list[tuple[np.ndarray, ...]]:
        """Passages near to each row's prompt, [n] int32 token ids each."""
        source = self.sources.passages if self.sources is not None else None
        vocab_size = self.engine.target.config.vocab_size
        found: list[tuple[np.ndarray, ...]] = [()] * len(rows)
        good = [i for i, row in enumerate(rows) if row.error is None]
        if source is not None and good:
            for i, passages in zip(good, source.passages([_question(rows[i]) for i in good]), strict=True):
                found[i] = tuple(passage[passage < vocab_size] for passage in passages)
        return found

    def keep(self, generation: Generation) -> None:
        """Makes a finished output findable, if the method looks for it."""
        if self.sources is not None and self.sources.sink is not None:
            self.sources.sink.append([np.asarray(generation.token_ids, np.int32)])


def load(config: ReplicaConfig, metrics: ReplicaMetrics) -> Loaded:
    """Loads the models and builds the engine, one replica of a node after the other.

    Raises:
        ModelError: a model cannot be loaded or is not supported.
        ConfigError: the options do not fit the model or the machine.
        DatastoreError: see `open_sources`.
        JobError: see `load_lock`.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    method = method_named(config.method, config.sources)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = resolve_model(config.model, config.revision)
    tokenizer = load_tokenizer(resolved, trust_remote_code=config.trust_remote_code)
    _check_stops(config.sampling, tokenizer)
    draft = None
    sources = None
    followers = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(load_lock(f"replica {config.replica} of {config.job}"))
        if config.num_ranks > 1:
            followers = Followers(config)
            stack.enter_context(followers.in_step())
        ranks = None if followers is None else followers.ranks
        model = load_causal_lm(
            resolved,
            getattr(torch, config.dtype),
            "auto" if config.is_split else device,
            trust_remote_code=config.trust_remote_code,
            quantization=config.quantization,
            num_ranks=config.num_ranks,
        )
        if "draft" in method.sources:
            if ranks is not None and (config.draft is None or is_head(config.draft)):
                ranks.tell(Gather())
            draft = load_draft(config.draft, model, resolved, trust_remote_code=config.trust_remote_code)
        if config.retrieval is not None:
            sources = open_sources(config.retrieval, method.sources, model.config.get_text_config().vocab_size, metrics)
        searchers = sources.searchers if sources is not None else ()
        options = EngineOptions(
            num_slots=config.slots,
            slot_tokens=config.slot_tokens,
            gpu_share=config.gpu_share,
            budget=config.budget,
            kv_memory=config.kv_memory,
            max_context=config.max_context,
            prefill_chunk=config.prefill_chunk,
        )
        engine = build_engine(model, tokenizer, method, options, searchers, draft, ranks)
    notes = (*method.notes, *([f"{engine.num_slots} slots"] if config.slot_tokens else ()))
    return Loaded(resolved.name, device, engine, tokenizer, sources, notes, followers)


def _question(row: InputRow) -> str:
    """What passages should be near to: the prompt, or what was said last."""
    return row.prompt if row.prompt is not None else str((row.messages or ({"content": ""},))[-1]["content"])


def _check_stops(params: SamplingParams, tokenizer: PreTrainedTokenizerBase) -> None:
    """Special tokens are left out of the text, so as stop strings they would never be found."""
    for stop in params.stop:
        if stop in tokenizer.all_special_tokens:
            token_id = tokenizer.convert_tokens_to_ids(stop)
            raise ConfigError(
                f"--stop is {stop!r}, a special token, which the text leaves out; use --stop-token-ids {token_id}."
            )
