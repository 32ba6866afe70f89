"""A stateful class for `Dataset.map_batches` that appends what the target says: the engine inside a Ray Data pipeline.

    dataset.map_batches(
        BatchGenerator, fn_constructor_kwargs={"model": "smollm2-135m", "max_new_tokens": 64},
        batch_format="pyarrow", batch_size=64, concurrency=2, num_gpus=1)

For what fits into one pipeline; it has no commits, no resume, and slots run empty at the end of each batch. A job of
millions of rows is `rasd generate`'s.
"""

import hashlib
import json
from typing import Any

import pyarrow as pa
import ray
from pydantic import ValidationError

from actors.loaded import load
from actors.metrics import ReplicaMetrics
from actors.records import failed_record, generated_record, result_fields, stats_of
from actors.rows import InputRow, RowFailure, ShardStats
from actors.searchers import RetrievalConfig
from jobs.backend import AUTO_DTYPE, ModelBackend, Retrieving, make_replica_config
from jobs.config import GenerateConfig
from jobs.options import explain
from jobs.readers.base import Record
from jobs.retrieval import sources_of
from jobs.validate import input_row
from pipeline.errors import ConfigError, RowError
from pipeline.methods import method_named
from pipeline.noise import row_seed
from pipeline.request import Generation, Request


class BatchGenerator:
    """Loads a model once; then each batch comes back with the columns of `rasd generate` from `text` on.

    A row's noise follows from `seed` and its column `row_index`, or without one its prompt: the same prompt gets the
    same text, whatever the batches. An input column of an output column's name gets the prefix `input_`.

    Args:
        options: of `rasd generate`, with underscores: `model`, `max_new_tokens`, `method`, `datastore`, ...

    Raises:
        ConfigError: an option is wrong, or makes no sense here.
        ModelError, DatastoreError: as of `rasd generate`.
    """

    def __init__(self, **options: Any) -> None:
        for name in ("prompts", "output", "num_samples", "tensor_parallel"):
            if name in options:
                raise ConfigError(f"{name} is {options[name]!r}; a pipeline has no such option. Leave it out.")
        if strange := sorted(options.keys() - GenerateConfig.model_fields.keys()):
            raise ConfigError(f"unknown option {strange[0]!r}; rasd generate --help lists them, here with underscores.")
        try:
            self._config = config = GenerateConfig(prompts=("dataset",), output="dataset", **options)
        except ValidationError as error:
            raise ConfigError(explain(error, GenerateConfig, options, None)) from None
        backend = ModelBackend()
        facts = backend.facts(config)
        sources = backend.sources(config, facts)
        retrieving = Retrieving(method_named(config.method, sources).name, sources)
        num_gpus = _num_reserved_gpus()
        device = config.device if config.device != "auto" else "cuda" if num_gpus else "cpu"
        replica_config = make_replica_config(
            config,
            retrieving,
            revision=facts.revision,
            device=device,
            dtype=AUTO_DTYPE[device] if config.dtype == "auto" else config.dtype,
            max_context=None if config.max_context == "auto" else config.max_context,
            retrieval=_in_process(config, facts.tokenizer, retrieving),
            replica=0,
            num_threads=None if config.num_threads == "auto" else config.num_threads,
            num_gpus=num_gpus if device == "cuda" else 0.0,
        )
        self._metrics = ReplicaMetrics(0, retrieving.method, "map_batches")
        self._loaded = load(replica_config, self._metrics)
        self._fields = result_fields(logprobs=config.logprobs)
        self._total = ShardStats()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with output columns.

        Raises:
            ConfigError: it is no Arrow table.
        """
        if not isinstance(batch, pa.Table):
            raise ConfigError(f'a batch is a {type(batch).__name__}; give map_batches batch_format="pyarrow".')
        rows = [self._row(fields, place) for place, fields in enumerate(batch.to_pylist())]
        records = self._generate(rows)
        taken = {name for name, _ in self._fields}
        names = list(batch.column_names)
        for i, name in enumerate(names):
            while names[i] in taken or (names[i] != name and names[i] in batch.column_names):
                names[i] = f"input_{names[i]}"
        table = batch.rename_columns(names)
        for name, kind in self._fields:
            table = table.append_column(name, pa.array([record.get(name) for record in records], kind))
        return table

    def _row(self, fields: dict[str, Any], place: int) -> InputRow:
        own = (self._config.text_column, "messages")
        index = fields.get("row_index")
        asked = {name: fields[name] for name in own if name in fields}
        if not isinstance(index, int) or isinstance(index, bool):
            text = json.dumps(asked, sort_keys=True, default=str)
            index = int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:7])
        return input_row(Record(f"row {place} of a batch", asked), index, self._config.text_column)

    def _generate(self, rows: list[InputRow]) -> list[dict[str, Any]]:
        engine = self._loaded.engine
        results: list[Generation | RowFailure | None] = [None] * len(rows)
        for place, (row, passages) in enumerate(zip(rows, self._loaded.passages(rows), strict=True)):
            failure, prompt_ids = self._loaded.encode(row)
            if failure is None:
                seed = row_seed(self._config.seed, row.row_index, 0)
                try:
                    engine.submit(Request(place, prompt_ids, self._config.sampling(), seed, passages))
                except RowError as error:
                    failure = RowFailure(error.error_type, str(error))
            results[place] = failure
        while engine.has_work:
            for generation in engine.step():
                results[generation.request_id] = generation
                self._loaded.keep(generation)
        return [self._record(row, result) for row, result in zip(rows, results, strict=True)]

    def _record(self, row: InputRow, result: Generation | RowFailure | None) -> dict[str, Any]:
        assert result is not None
        seed = row_seed(self._config.seed, row.row_index, 0)
        record = (
            generated_record(row, 0, seed, result)
            if isinstance(result, Generation)
            else failed_record(row, 0, seed, result)
        )
        stats = stats_of(record)
        self._total += stats
        self._metrics.finished(stats, self._total, record.get("error_type"))
        return record


def _num_reserved_gpus() -> float:
    """What was asked of Ray, not what the process sees: Ray does not hide GPUs from an actor that asked for none."""
    if not ray.is_initialized() or not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return 0.0
    reserved: dict[str, float] = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
    return reserved["GPU"]  # may be a part of one


def _in_process(config: GenerateConfig, tokenizer: str, retrieving: Retrieving) -> RetrievalConfig | None:
    """All of retrieval in this process; its live store knows this actor's own outputs."""
    if not sources_of(retrieving.method, retrieving.sources - {"draft"}):
        return None
    return RetrievalConfig(
        mode="in-process",
        datastore=config.datastore,
        fingerprint=None,
        tokenizer=tokenizer,
        live_capacity=config.live_tokens,
        num_passages=config.passages,
        output=None,
        services={},
        deadline=0.0,
    )
