"""From the outputs of a generation job to sequences to train on: prompts tokenised again, answers as token ids."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from jobs.commit import read_commits
from jobs.readers.stream import reading
from pipeline.prompts import encode_messages, encode_prompt
from pipeline.training.data import Example

_COLUMNS = ("prompt", "messages", "token_ids", "status")
_MIN_OUTPUT = 2


def read_examples(output: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """All good rows of a job with at least two output tokens, in order.

    Raises:
        InputError: a part file cannot be read.
    """
    return [example for part in _parts(output) for example in _examples(part, tokenizer)]


def _parts(output: Path) -> Iterator[Path]:
    return (output / commit.file for commit, _ in read_commits(output) if commit is not None)


def _examples(part: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    with reading(part):
        names = set(pq.read_schema(part).names)
        rows = pq.read_table(part, columns=[name for name in _COLUMNS if name in names]).to_pylist()
    for row in rows:
        if row["status"] != "ok" or len(row["token_ids"]) < _MIN_OUTPUT:
            continue
        if row.get("messages") is not None:
            prompt = encode_messages(tokenizer, row["messages"])
        else:
            prompt = encode_prompt(tokenizer, row["prompt"])
        yield Example(np.array([*prompt, *row["token_ids"]], np.int32), len(prompt))


def split(examples: Sequence[Example], held_out: int) -> tuple[list[Example], list[Example]]:
    """Examples to learn from, and evenly spaced ones to evaluate on: at most `held_out`, and at most a tenth."""
    count = min(held_out, max(len(examples) // 10, 1))
    chosen = set(np.linspace(0, len(examples) - 1, count).round().astype(int).tolist())
    kept = [example for i, example in enumerate(examples) if i not in chosen]
    return kept, [examples[i] for i in sorted(chosen)]
