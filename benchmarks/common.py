"""What every benchmark shares: prompts, engines, the machine's description, and where results go."""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.machine import machine
from pipeline.assemble import EngineOptions, build_engine
from pipeline.engine import Engine
from pipeline.methods import method_named
from pipeline.models import load_causal_lm, load_tokenizer, resolve_model
from pipeline.prompts import encode_messages


@dataclass(frozen=True, slots=True)
class Prompt:
    """One tokenised prompt; `question` is what was said last."""

    id: str
    task: str
    ids: tuple[int, ...]
    question: str = ""


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that all benchmarks have."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--model", default="smollm2-135m", help="model name or path")
    arguments.add_argument("--prompts", nargs="+", required=True, help="JSONL files of {id, task, messages}")
    arguments.add_argument("--output", type=Path, help="JSON file for the results; printed in any case")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    return arguments


def load_prompts(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, per_task: int, tasks: Sequence[str] = (), skip: int = 0
) -> list[Prompt]:
    """The same number of prompts of every task, in the files' order.

    Args:
        tasks: only these; all if empty.
        skip: prompts of each task passed over first, so that two benchmarks need not use the same.
    """
    prompts: list[Prompt] = []
    taken: dict[str, int] = {}
    for path in paths:
        for line in Path(path).read_text().splitlines():
            row = json.loads(line)
            task = row["task"]
            if tasks and task not in tasks:
                continue
            taken[task] = taken.get(task, 0) + 1
            if skip < taken[task] <= skip + per_task:
                question = row["messages"][-1]["content"]
                prompts.append(Prompt(str(row["id"]), task, encode_messages(tokenizer, row["messages"]), question))
    return prompts


def load(model: str, dtype: torch.dtype, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model as `generate` users have it, and its tokenizer."""
    resolved = resolve_model(model)
    return load_causal_lm(resolved, dtype, device), load_tokenizer(resolved)


def engine_for(model: str, dtype: torch.dtype, method: str, slots: int, **options: Any) -> Engine:
    """An engine over a model of its own."""
    loaded, tokenizer = load(model, dtype)
    return build_engine(loaded, tokenizer, method_named(method), EngineOptions(num_slots=slots, **options))


def shuffled(prompts: Sequence[Prompt], seed: int) -> list[int]:
    """Indices of the prompts in a random order."""
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    return order


def report(results: dict[str, Any], output: Path | None) -> None:
    """Prints results as JSON, and writes them to a file if one is named."""
    text = json.dumps({"machine": machine(), **results}, indent=2)
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
