"""A replica: one target model with its engine in one process, generating whole shards.

A plain class; `ray.remote(Replica)` at the call site makes it an actor, with enough concurrency that several shards
fill the slots together. Knows nothing of the job beyond the shards it is handed.
"""

import itertools
import os
import platform
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from actors.loop import EngineLoop, Outcome
from actors.metrics import ReplicaMetrics
from actors.parts import PartWriter, finish_shard
from actors.records import failed_record, generated_record, stats_of
from actors.rows import InputRow, ReplicaInfo, RowFailure, ShardResult, ShardStats, ShardTask
from actors.searchers import RetrievalConfig
from actors.sources import Sources, open_sources
from pipeline.assemble import EngineOptions, build_engine
from pipeline.drafts import load_draft
from pipeline.errors import ConfigError, JobError, RowError
from pipeline.methods import method_named
from pipeline.models import load_causal_lm, load_tokenizer, resolve_model
from pipeline.noise import row_seed
from pipeline.prompts import encode_messages, encode_prompt
from pipeline.request import Generation, Request, SamplingParams

_SEARCHED_ROWS = 8  # rows whose passages are looked up together, before the first of them can start


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """All a replica must know; `sampling`, `seed`, `dtype` and the model fix the text, the rest only the speed.

    Attributes:
        device: `auto`, `cpu` or `cuda`.
        dtype: `float32`, `bfloat16` or `float16`.
        budget: most tree nodes a slot and round; None tunes itself.
        kv_memory: bytes for keys and values; None takes a share of what is free.
        sources: of `PROVIDED_BY` in `pipeline.methods`: what this job has.
        draft: model, or directory of a head, for the source `draft`; None is the head shipped for the target.
        retrieval: where the others are; None if the method needs none of them.
        job: absolute path of the job's output directory; names the job in metrics.
        num_threads: CPU threads of torch and numba; None leaves their default.
        is_traced: keep the times of the newest rounds' phases, which `stop` returns.
    """

    model: str
    revision: str | None
    dtype: str
    device: str
    slots: int
    method: str
    budget: int | None
    sampling: SamplingParams
    seed: int
    num_samples: int
    kv_memory: int | None
    max_context: int | None
    prefill_chunk: int
    trust_remote_code: bool
    sources: tuple[str, ...]
    draft: str | None
    retrieval: RetrievalConfig | None
    replica: int
    job: str
    num_threads: int | None
    is_traced: bool


@dataclass(frozen=True, slots=True)
class _Sample:
    row: InputRow
    sample: int
    seed: int


class Replica:
    """Generates shards. Call `start` first; `run_shard` may run in several threads at once."""

    def __init__(self, config: ReplicaConfig) -> None:
        self._config = config
        self._loop: EngineLoop | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._sources: Sources | None = None
        self._vocab_size = 0
        self._request_ids = itertools.count()
        self._stats = ShardStats()
        self._metrics = ReplicaMetrics(config.replica, config.method, config.job)
        self._stats_lock = threading.Lock()

    def start(self) -> ReplicaInfo:
        """Loads the model and starts the engine.

        Raises:
            ModelError: the model cannot be loaded or is not supported.
            ConfigError: the options do not fit the model or the machine.
        """
        begin = time.perf_counter()
        config = self._config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        method = method_named(config.method, config.sources)
        device = _device(config.device)
        resolved = resolve_model(config.model, config.revision)
        tokenizer = load_tokenizer(resolved, trust_remote_code=config.trust_remote_code)
        _check_stops(config.sampling, tokenizer)
        model = load_causal_lm(
            resolved, getattr(torch, config.dtype), device, trust_remote_code=config.trust_remote_code
        )
        options = EngineOptions(config.slots, config.budget, config.kv_memory, config.max_context, config.prefill_chunk)
        self._vocab_size = model.config.get_text_config().vocab_size
        if config.retrieval is not None:
            self._sources = open_sources(config.retrieval, method.sources, self._vocab_size, self._metrics)
        searchers = self._sources.searchers if self._sources is not None else ()
        draft = None
        if "draft" in method.sources:
            draft = load_draft(config.draft, model, resolved, trust_remote_code=config.trust_remote_code)
        engine = build_engine(model, tokenizer, method, options, searchers, draft)
        self._tokenizer = tokenizer
        if config.is_traced:
            engine.phases.keep_spans()
        self._loop = EngineLoop(engine)
        return ReplicaInfo(
            replica=config.replica,
            node=platform.node(),
            pid=os.getpid(),
            model=resolved.name,
            device=device,
            dtype=config.dtype,
            load_seconds=time.perf_counter() - begin,
            max_context=engine.max_context,
            notes=method.notes,
        )

    def run_shard(self, task: ShardTask) -> ShardResult:
        """Generates all rows of a shard and writes its part file; concurrent calls share the slots.

        Raises:
            JobError: the part file cannot be written, or the engine failed.
        """
        begin = time.perf_counter()
        writer = PartWriter(task.part_path, task.schema)
        outcomes: SimpleQueue[Outcome] = SimpleQueue()
        pending: dict[int, _Sample] = {}
        for first in range(0, len(task.rows), _SEARCHED_ROWS):
            rows = task.rows[first : first + _SEARCHED_ROWS]
            for row, passages in zip(rows, self._passages(rows), strict=True):
                failure, prompt_ids = self._encode(row)
                for k in range(self._config.num_samples):
                    sample = _Sample(row, k, row_seed(self._config.seed, row.row_index, k))
                    if failure is not None:
                        self._add(writer, sample, failure)
                        continue
                    request = Request(next(self._request_ids), prompt_ids, self._config.sampling, sample.seed, passages)
                    pending[request.request_id] = sample
                    self._engine_loop.submit(request, outcomes)
        while pending:
            outcome = outcomes.get()
            if isinstance(outcome.result, JobError):
                raise outcome.result
            self._add(writer, pending.pop(outcome.request_id), outcome.result)
        if self._sources is not None:
            misses = self._sources.misses.take()
            writer.count(ShardStats(retrieval_misses=misses))
            self._metrics.missed(misses)
        return finish_shard(task, writer, time.perf_counter() - begin)

    def progress(self) -> ShardStats:
        """Totals of all rows finished since the start."""
        with self._stats_lock:
            return self._stats

    def stop(self) -> list[dict[str, Any]]:
        """Ends the engine's thread; returns the events of its rounds, if they are traced."""
        if self._loop is None:
            return []
        self._loop.stop()
        return self._loop.phases.events(self._config.replica)

    @property
    def _engine_loop(self) -> EngineLoop:
        if self._loop is None:
            raise JobError("run_shard was called before start.")
        return self._loop

    def _encode(self, row: InputRow) -> tuple[RowFailure | None, tuple[int, ...]]:
        """The row's prompt as token ids, or why there are none."""
        assert self._tokenizer is not None
        if row.error is not None:
            return row.error, ()
        try:
            if row.messages is not None:
                return None, encode_messages(self._tokenizer, row.messages)
            assert row.prompt is not None
            return None, encode_prompt(self._tokenizer, row.prompt)
        except RowError as error:
            return RowFailure(error.error_type, str(error)), ()

    def _passages(self, rows: Sequence[InputRow]) -> list[tuple[np.ndarray, ...]]:
        """Passages near to each row's prompt."""
        source = self._sources.passages if self._sources is not None else None
        found: list[tuple[np.ndarray, ...]] = [()] * len(rows)
        good = [i for i, row in enumerate(rows) if row.error is None]
        if source is not None and good:
            for i, passages in zip(good, source.passages([_question(rows[i]) for i in good]), strict=True):
                found[i] = tuple(passage[passage < self._vocab_size] for passage in passages)
        return found

    def _add(self, writer: PartWriter, sample: _Sample, result: Generation | RowError | RowFailure) -> None:
        if isinstance(result, Generation):
            record = generated_record(sample.row, sample.sample, sample.seed, result)
            if self._sources is not None and self._sources.sink is not None:
                self._sources.sink.append([np.asarray(result.token_ids, np.int32)])
        else:
            failure = RowFailure(result.error_type, str(result)) if isinstance(result, RowError) else result
            record = failed_record(sample.row, sample.sample, sample.seed, failure)
        writer.add(record)
        stats = stats_of(record)
        with self._stats_lock:
            self._stats += stats
            self._metrics.finished(stats, self._stats, record.get("error_type"))


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


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
