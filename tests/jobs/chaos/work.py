"""What the jobs of a campaign share: a tiny model, a datastore, prompts, the command, and the rows they must give."""

import contextlib
import io
import json
import random
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.commit import read_commits
from jobs.verify import verify
from pipeline.models import load_tokenizer, resolve_model
from tests.jobs import stores

# How a row was generated, not what came of it (design section 8).
STATISTICS = frozenset({"rounds", "drafted", "accepted", "accepted_by_source", "rounds_without_draft"})
NUM_SAMPLES = 2
ROWS_PER_SHARD = 4
_SUBJECTS = ("the quick brown fox", "a lazy dog", "line after line", "the jumps", "over the fox", "brown dogs")


@dataclass(frozen=True, slots=True)
class Work:
    """The inputs of all jobs of a campaign.

    Attributes:
        num_rows: of the prompts; two of them are bad.
    """

    model: Path
    datastore: Path
    prompts: Path
    num_rows: int

    def command(self, output: Path, address: str) -> list[str]:
        """`rasd generate` with two replicas that share a retrieval service."""
        words = ["--model", str(self.model), "--prompts", str(self.prompts), "--output", str(output)]
        words += ["--dtype", "float32", "--max-new-tokens", "48", "--temperature", "0.8", "--seed", "11"]
        words += ["--num-samples", str(NUM_SAMPLES), "--rows-per-shard", str(ROWS_PER_SHARD), "--slots", "4"]
        words += ["--datastore", str(self.datastore), "--live", "on", "--retrieval", "shared", "--num-replicas", "2"]
        return [sys.executable, "-m", "jobs.cli", "generate", *words, "--quiet", "--ray-address", address]

    @property
    def num_output_rows(self) -> int:
        return self.num_rows * NUM_SAMPLES


@dataclass(frozen=True, slots=True)
class Differences:
    """Of the rows of a job from those of the undisturbed one."""

    missing: int
    doubled: int
    different: int


def make_work(directory: Path, num_shards: int) -> Work:
    """Write everything below `directory`; the same each time."""
    model = stores.tiny_model(directory / "model")
    tokenizer = load_tokenizer(resolve_model(str(model)))
    stores.add_weights(model, len(tokenizer), num_layers=4, max_context=256)

    pick = random.Random(0)
    lines = [
        json.dumps({"id": f"r{i}", "prompt": f"{pick.choice(_SUBJECTS)} {pick.choice(_SUBJECTS)} {i}", "n": i})
        for i in range(num_shards * ROWS_PER_SHARD)
    ]
    lines[5], lines[-2] = '{"prompt": ', '{"id": "lost"}'
    prompts = directory / "prompts.jsonl"
    prompts.write_text("\n".join(lines) + "\n")
    corpus = stores.write_rows(directory / "corpus.jsonl", [" ".join(pick.choices(_SUBJECTS, k=30)) for _ in range(20)])
    with contextlib.redirect_stdout(io.StringIO()):
        stores.run_build(model, directory / "store", corpus)
    return Work(model, directory / "store", prompts, len(lines))


def rows_of(output: Path) -> list[dict[str, Any]]:
    """All committed rows as a reader reads them, without statistics."""
    parts = [output / commit.file for commit, _ in read_commits(output) if commit is not None]
    names = [name for name in pq.read_schema(parts[0]).names if name not in STATISTICS] if parts else []
    return [row for part in parts for row in pq.read_table(part, columns=names).to_pylist()]


def compare(output: Path, wanted: list[dict[str, Any]]) -> Differences:
    """How the rows of a job differ from those of the undisturbed one."""
    expected = {_key(row): row for row in wanted}
    found = rows_of(output)
    counts = Counter(_key(row) for row in found)
    return Differences(
        missing=len(expected.keys() - counts.keys()),
        doubled=sum(count - 1 for count in counts.values()),
        different=sum(row != expected.get(_key(row)) for row in found),
    )


def is_intact(output: Path) -> tuple[bool, str]:
    """What `rasd verify` says."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = verify(str(output))
    return code == 0, printed.getvalue()


def _key(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["row_index"], row["sample"]
