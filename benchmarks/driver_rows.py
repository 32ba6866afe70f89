"""What the driver costs a row: a whole `rasd generate` over a million rows, its replicas without a model.

    python -m benchmarks.driver_rows --output benchmarks/results/driver_rows.json

Everything but the model is real: reading, planning, lease, commit log, and two replicas as Ray actors, which sleep a
known time for each shard and write its part file. They are other processes, so this one's CPU time is the driver's,
Ray's threads in it included. Then a tenth of the commits is removed, at random and at the end, and the job is resumed.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import report
from benchmarks.timed_replica import NotingReplica, SteadySeconds
from jobs.backend import Launch, Retrieving
from jobs.commit import record_key
from jobs.config import GenerateConfig
from jobs.generation import generate
from jobs.plan import ModelFacts
from tests.fakes import FakeBackend

_MARKS = (0.1, 0.5, 1.0)
_WORDS = ["retrieval", "augmented", "speculative", "decoding", "verifies", "drafted", "trees", "with", "one", "pass"]


@dataclass
class NotingBackend(FakeBackend):
    """Launches them, and notes when the driver asks for what.

    Attributes:
        at: seconds since the epoch at which the inputs were found, and all was planned and the log open.
    """

    seconds: float
    notes: Path
    at: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def facts(self, config: GenerateConfig) -> ModelFacts:
        """See `jobs.backend.Backend`."""
        self.at["inputs_found"] = time.time()
        return super().facts(config)

    def services(self, config: GenerateConfig, facts: ModelFacts, retrieving: Retrieving) -> None:
        """See `jobs.backend.Backend`."""
        self.at["planned_and_ray_started"] = time.time()

    def launch(self, launch: Launch) -> Any:
        """See `jobs.backend.Backend`."""
        note = str(self.notes / str(launch.replica))
        dtype = str(launch.resolved["dtype"])
        return launch.actor(NotingReplica, note, launch.config, launch.replica, dtype, SteadySeconds(self.seconds))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-shard", help="by default as the plan chooses")
    parser.add_argument("--shard-seconds", type=float, default=0.02, help="how long a replica takes for a shard")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rows-") as directory:
        report(measure(Path(directory), options), options.output)


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Plan, run, and resume twice, each in a process of its own."""
    prompts, output = directory / "prompts.jsonl", directory / "out"
    write_prompts(prompts, options.rows)
    settings = {"model": "fake", "prompts": (str(prompts),), "output": str(output), "num_replicas": 2, "quiet": True}
    settings["ray_address"] = "local"
    if options.rows_per_shard:
        settings["rows_per_shard"] = int(options.rows_per_shard)
    config = GenerateConfig(**settings)
    results: dict[str, Any] = {"rows": options.rows, "input_bytes": prompts.stat().st_size}
    results["shard_seconds"] = options.shard_seconds
    results["plan"] = _apart(config.model_copy(update={"dry_run": True}), options.shard_seconds, directory)
    results["run"] = _apart(config, options.shard_seconds, directory)
    results["run"]["driver_cpu_ms_a_row"] = 1000 * results["run"]["driver_cpu_seconds"] / options.rows
    results["rows_per_shard"] = json.loads((output / "plan.json").read_text())["rows_per_shard"]
    results["shards"] = num_shards = len(os.listdir(output / "_commits"))
    lost = num_shards // 10
    for name, shards in (
        ("resume_random", random.Random(0).sample(range(num_shards), lost)),
        ("resume_end", range(num_shards - lost, num_shards)),
    ):
        for shard in shards:
            (output / record_key(shard)).unlink()
            (output / f"part-{shard:06d}.parquet").unlink()
        results[name] = _apart(config, options.shard_seconds, directory)
        if len(os.listdir(output / "_commits")) != num_shards:
            raise RuntimeError(f"{name} left shards undone.")
    return results


def write_prompts(path: Path, rows: int) -> None:
    """Rows of about 200 bytes with an id, a prompt and two other columns."""
    source = random.Random(0)
    with path.open("w") as file:
        for i in range(rows):
            prompt = " ".join(source.choices(_WORDS, k=14))
            file.write(json.dumps({"id": f"row-{i}", "prompt": prompt, "topic": _WORDS[i % 10], "score": i / 7}) + "\n")


def _apart(config: GenerateConfig, shard_seconds: float, directory: Path) -> dict[str, Any]:
    notes = directory / "notes"
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, config, shard_seconds, notes, time.time()).result()


def measured(config: GenerateConfig, shard_seconds: float, notes: Path, began: float) -> dict[str, Any]:
    """One `rasd generate` in this process.

    Args:
        began: when its process was started, in seconds since the epoch.
    """
    backend = NotingBackend(shard_seconds, notes)
    imported, cpu = time.time(), time.process_time()
    with _memory(Path(config.output)) as peaks, contextlib.redirect_stdout(io.StringIO()):
        if code := generate(config, backend):
            raise RuntimeError(f"rasd generate ended with {code}.")
    figures: dict[str, Any] = {
        "seconds": time.time() - began,
        "import_seconds": imported - began,
        "driver_cpu_seconds": time.process_time() - cpu,
        **{f"seconds_until_{name}": at - began for name, at in backend.at.items()},
        **peaks,
    }
    if first := [float(note.read_text()) for note in notes.iterdir()]:
        figures["seconds_until_first_shard"] = min(first) - began
    return {name: round(value, 4) for name, value in figures.items()}


@contextlib.contextmanager
def _memory(output: Path) -> Iterator[dict[str, float]]:
    """Fills in the most memory that this process had, in MB, until each mark of the shards was committed."""
    peaks: dict[str, float] = {}
    samples: list[tuple[int, float]] = []
    ended = threading.Event()

    def sample() -> None:
        process = psutil.Process()
        while True:
            is_last = ended.wait(0.5)
            commits = len(os.listdir(output / "_commits")) if (output / "_commits").exists() else 0
            samples.append((commits, process.memory_info().rss / 1e6))
            if is_last:
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()
    total = max(commits for commits, _ in samples)
    for mark in _MARKS:
        peaks[f"peak_mb_until_{mark:.0%}"] = max(
            (mb for commits, mb in samples if commits <= mark * total), default=samples[0][1]
        )


if __name__ == "__main__":
    main()
