"""A replica: one target model with its engine in one process, generating whole shards.

A plain class; `ray.remote(Replica)` at the call site makes it an actor, with enough concurrency that several shards
fill the slots together. Knows nothing of the job beyond the shards it is handed.
"""

import itertools
import os
import platform
import threading
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from actors.loaded import Loaded, load
from actors.loop import EngineLoop, Outcome
from actors.metrics import ReplicaMetrics
from actors.records import failed_record, generated_record, stats_of
from actors.replica_config import ReplicaConfig
from actors.rows import InputRow, ReplicaInfo, RowFailure, ShardResult, ShardStats, ShardTask
from actors.shard_output import ShardOutput
from actors.witness import Witness
from pipeline.errors import JobError, RowError
from pipeline.noise import row_seed
from pipeline.provenance import Recorder
from pipeline.request import Generation, Request

_SEARCHED_ROWS = 8  # rows whose passages are looked up together, before the first of them can start


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
        self._loaded: Loaded
        self._witness: Witness
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
        self._loaded = loaded = load(config, self._metrics)
        if config.is_traced:
            loaded.engine.phases.keep_spans()
        loaded.engine.recorder = Recorder()
        self._witness = Witness(loaded.engine.recorder, loaded.tokenizer)
        followers = loaded.followers
        self._loop = EngineLoop(loaded.engine, None if followers is None else followers.explain)
        return ReplicaInfo(
            replica=config.replica,
            node=platform.node(),
            pid=os.getpid(),
            model=loaded.name,
            device=loaded.device,
            dtype=config.dtype,
            load_seconds=time.perf_counter() - begin,
            max_context=loaded.engine.max_context,
            notes=loaded.notes,
        )

    def run_shard(self, task: ShardTask) -> ShardResult:
        """Generates the rows of a shard that no earlier attempt did, and writes its part file.

        Concurrent calls share the slots.

        Raises:
            JobError: the part file cannot be written, or the engine failed.
        """
        loop, loaded = self._engine_loop, self._loaded
        output = ShardOutput(task)
        outcomes: SimpleQueue[Outcome] = SimpleQueue()
        pending: dict[int, _Sample] = {}
        unfinished = self._unfinished(task, output)
        for first in range(0, len(unfinished), _SEARCHED_ROWS):
            batch = unfinished[first : first + _SEARCHED_ROWS]
            found = loaded.passages([samples[0].row for samples in batch])
            for samples, passages in zip(batch, found, strict=True):
                failure, prompt_ids = loaded.encode(samples[0].row)
                for sample in samples:
                    if failure is not None:
                        self._add(output, sample, failure)
                        continue
                    request = Request(next(self._request_ids), prompt_ids, self._config.sampling, sample.seed, passages)
                    pending[request.request_id] = sample
                    self._witness.submitted(request.request_id)
                    loop.submit(request, outcomes)
        while pending:
            try:
                outcome = outcomes.get(timeout=output.seconds_left())
            except Empty:
                output.save_if_due()
                continue
            if isinstance(outcome.result, JobError):
                raise outcome.result
            self._add(output, pending.pop(outcome.request_id), outcome.result)
        if loaded.sources is not None:
            misses = loaded.sources.misses.take()
            output.count(ShardStats(retrieval_misses=misses))
            self._metrics.missed(misses)
        return output.finish()

    def progress(self) -> ShardStats:
        """Totals of all rows finished since the start."""
        with self._stats_lock:
            self._metrics.working(self._stats)
            return self._stats

    def stop(self) -> list[dict[str, Any]]:
        """Ends the engine's thread; returns what it can tell of its rounds, and their events if they are traced."""
        if self._loop is None:
            return []
        self._loop.stop()
        if self._loaded.followers is not None:
            self._loaded.followers.leave()
        phases, replica = self._loop.phases, self._config.replica
        return [self._witness.event(replica, dict(phases.seconds)), *phases.events(replica)]

    @property
    def _engine_loop(self) -> EngineLoop:
        if self._loop is None:
            raise JobError("run_shard was called before start.")
        return self._loop

    def _unfinished(self, task: ShardTask, output: ShardOutput) -> list[list[_Sample]]:
        """Samples to generate, those of a row together; the others are taken over."""
        unfinished = []
        for row in task.rows:
            samples = []
            for k in range(self._config.num_samples):
                sample = _Sample(row, k, row_seed(self._config.seed, row.row_index, k))
                if (stats := output.resume(row, k, sample.seed)) is None:
                    samples.append(sample)
                    continue
                with self._stats_lock:
                    self._stats += stats
            if samples:
                unfinished.append(samples)
        return unfinished

    def _add(self, output: ShardOutput, sample: _Sample, result: Generation | RowError | RowFailure) -> None:
        if isinstance(result, Generation):
            record = generated_record(sample.row, sample.sample, sample.seed, result)
            self._loaded.keep(result)
            self._witness.finished(sample.row, result)
        else:
            failure = RowFailure(result.error_type, str(result)) if isinstance(result, RowError) else result
            record = failed_record(sample.row, sample.sample, sample.seed, failure)
        output.add(record)
        stats = stats_of(record)
        with self._stats_lock:
            self._stats += stats
            self._metrics.finished(stats, self._stats, record.get("error_type"))
