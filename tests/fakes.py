"""Stand-ins that behave, for tests of everything around the model.

`FakeReplica` answers as `actors.replica.Replica` does, without a model: its text is a hash of the prompt, each row
takes a known time, and it can be told to die.
"""

import hashlib
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.records import failed_record, generated_record, stats_of
from actors.rows import InputRow, ReplicaInfo, RowFailure, ShardResult, ShardStats, ShardTask
from actors.shard_output import ShardOutput
from jobs.backend import Launch, Retrieving
from jobs.config import GenerateConfig
from jobs.plan import MemoryEstimate, ModelFacts
from pipeline.errors import ModelError
from pipeline.request import Generation

TOKENS_A_ROW = 8


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, and how often.

    Attributes:
        seconds_a_row: time each output row takes.
        deadly_prompt: a prompt that ends the process of whoever generates it.
        deadly_rows: how many rows a shard has at least for that prompt to do harm in it.
        deaths: how many processes it ends before it is harmless; counted in `marks`, which outlives them.
        marks: a directory.
        ledger: a directory in which each process notes the samples that it has generated.
        start_deaths: how many processes `start` ends, counted there, too.
        start_error: message of the ModelError that `start` raises.
        dtype: what `start` reports where `auto` was asked for.
    """

    seconds_a_row: float = 0.0
    deadly_prompt: str | None = None
    deadly_rows: int = 1
    deaths: int = 10**9
    marks: str = ""
    ledger: str = ""
    start_deaths: int = 0
    start_error: str | None = None
    dtype: str = "float32"


def fake_seed(job_seed: int, row_index: int, sample: int) -> int:
    """Unsigned 64-bit seed of a sample; not that of `pipeline.noise`, whose import would slow every fake's start."""
    return int.from_bytes(hashlib.sha256(f"{job_seed} {row_index} {sample}".encode()).digest()[:8])


def fake_generation(prompt: str, seed: int) -> Generation:
    """What every fake replica says to a prompt."""
    digest = hashlib.sha256(f"{prompt}\0{seed}".encode()).digest()
    return Generation(
        request_id=0,
        token_ids=tuple(digest[:TOKENS_A_ROW]),
        text=digest.hex()[: 2 * TOKENS_A_ROW],
        finish_reason="length",
        num_prompt_tokens=len(prompt.split()),
        rounds=4,
        drafted=6,
        accepted=3,
        accepted_by_source={"context": 3},
        rounds_without_draft=1,
    )


class FakeReplica:
    """A replica without a model; deterministic in (prompt, seed, row_index, sample)."""

    def __init__(self, config: GenerateConfig, replica: int, dtype: str, faults: Faults) -> None:
        self._config = config
        self._replica = replica
        self._dtype = dtype
        self._faults = faults
        self._stats = ShardStats()
        self._lock = threading.Lock()

    def start(self) -> ReplicaInfo:
        """Raises ModelError if so told."""
        if self._faults.start_deaths:
            self._die(self._faults.start_deaths)
        if self._faults.start_error is not None:
            raise ModelError(self._faults.start_error)
        return ReplicaInfo(
            replica=self._replica,
            node="node",
            pid=os.getpid(),
            model=self._config.model,
            device="cpu",
            dtype=self._faults.dtype if self._dtype == "auto" else self._dtype,
            load_seconds=0.0,
            max_context=2048,
            notes=("a fake",),
        )

    def run_shard(self, task: ShardTask) -> ShardResult:
        """Write the part file of a shard."""
        output = ShardOutput(task)
        for row in task.rows:
            for sample in range(self._config.num_samples):
                seed = fake_seed(self._config.seed, row.row_index, sample)
                stats = output.resume(row, sample, seed)
                if stats is None:
                    if len(task.rows) >= self._faults.deadly_rows and row.error is None:
                        self._die_of(row.prompt)
                    record = self._record(row, sample, seed)
                    output.add(record)
                    stats = stats_of(record)
                with self._lock:
                    self._stats += stats
        return output.finish()

    def progress(self) -> ShardStats:
        """Totals of this process."""
        return self._stats

    def stop(self) -> None:
        """Nothing to tidy up."""

    def _record(self, row: InputRow, sample: int, seed: int) -> dict[str, Any]:
        if row.error is not None:
            return failed_record(row, sample, seed, row.error)
        time.sleep(self._faults.seconds_a_row)
        text = row.prompt if row.prompt is not None else str(row.messages)
        if len(text.split()) > self._config.max_new_tokens:
            return failed_record(row, sample, seed, RowFailure("prompt_too_long", f"{len(text.split())} words"))
        if self._faults.ledger:
            with Path(self._faults.ledger, str(os.getpid())).open("a") as ledger:
                ledger.write(f"{row.row_index} {sample}\n")
        return generated_record(row, sample, seed, fake_generation(text, seed))

    def _die_of(self, prompt: str | None) -> None:
        if prompt is not None and prompt == self._faults.deadly_prompt:
            self._die(self._faults.deaths)

    def _die(self, deaths: int) -> None:
        """Unless so many have."""
        marks = Path(self._faults.marks)
        if len(list(marks.iterdir())) < deaths:
            (marks / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)


class FakeBackend:
    """Backend of fake replicas; keeps their actors in `actors` so that a test can end them."""

    def __init__(self, faults: Faults | None = None, template: str = "template") -> None:
        self.actors: list[Any] = []
        self._faults = faults or Faults()
        self._template = template

    def facts(self, config: GenerateConfig) -> ModelFacts:
        """An identity that follows from the model's name alone."""
        return ModelFacts(config.model, None, f"weights of {config.model}", "tokenizer", self._template)

    def memory(self, config: GenerateConfig) -> MemoryEstimate:
        """1 GiB of weights and 2 GiB of KV cache."""
        return MemoryEstimate("float32", 2048, 1 << 30, 1 << 16, 16, 1 << 31)

    def sources(self, config: GenerateConfig, facts: ModelFacts) -> frozenset[str]:
        """Nothing to search."""
        return frozenset()

    def services(self, config: GenerateConfig, facts: ModelFacts, retrieving: Retrieving) -> None:
        """Nothing that is shared."""

    def launch(self, launch: Launch) -> Any:
        """A fake replica as an actor."""
        dtype = str(launch.resolved["dtype"])
        actor = launch.actor(FakeReplica, launch.config, launch.replica, dtype, self._faults)
        self.actors.append(actor)
        return actor
