"""`--dry-run`: what a job would do and how much memory it would take, without weights, replicas or files."""

import json
from dataclasses import asdict

from jobs.backend import AUTO_SLOTS
from jobs.config import GenerateConfig
from jobs.plan import MemoryEstimate, Plan
from jobs.report import print_table

_GIB = 1 << 30


def _kv(config: GenerateConfig, memory: MemoryEstimate) -> str:
    if config.slots == "auto" and memory.slots != AUTO_SLOTS["cpu"]:
        each = f"{memory.kv_per_token / 1024:.0f} KiB KV a token"
        return f"{each}: slots by free memory, {memory.slots} at most, rows of up to {memory.max_context} tokens"
    return f"{memory.kv / _GIB:.2f} GiB KV at most: {memory.slots} slots x {memory.max_context} tokens"


def print_plan(plan: Plan, config: GenerateConfig, method: str, memory: MemoryEstimate) -> None:
    """A table for people, unless quiet, and one JSON record as the last line."""
    if not config.quiet:
        print_table(
            [
                ("rows", f"{plan.num_rows} prompts x {plan.num_samples} samples = {plan.num_output_rows} output rows"),
                ("shards", f"{plan.num_shards} of up to {plan.rows_per_shard} prompts"),
                *(("input", f"{file['path']}: {file['rows']} rows, {file['bytes']} bytes") for file in plan.inputs),
                ("model", f"{config.model}, {memory.dtype}"),
                ("method", method),
                ("replicas", config.num_replicas),
                ("memory", f"{memory.weights / _GIB:.2f} GiB weights a replica"),
                ("", _kv(config, memory)),
                *(("column", f"{field.name}: {field.type}") for field in plan.schema),
            ]
        )
    record = {
        "state": "planned",
        "rows": plan.num_output_rows,
        "num_shards": plan.num_shards,
        "rows_per_shard": plan.rows_per_shard,
        "model": config.model,
        "method": method,
        "memory": asdict(memory),
        "output": config.output,
    }
    print(json.dumps(record), flush=True)
