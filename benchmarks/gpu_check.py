"""Is rasd right on a GPU, and how fast? Needs torch, transformers, numpy, numba and safetensors; no ray, no faiss.

    python -m benchmarks.gpu_check --prompts FILES... --output benchmarks/results/gpu.json

1. Equality: greedy output of every method in fp32 against transformers' `generate`, sampled output against our plain
   decoding at one slot; a difference counts as in `benchmarks.reference`.
2. Speed in bf16: every method at every slot count, each ratio to plain decoding at the same slots in the same run, and
   at one slot to `generate`; where a round's time goes, and for how much of it the GPU computes.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Prompt, load, load_prompts, parser, report
from benchmarks.reference import first_mismatch, generate
from pipeline.assemble import EngineOptions, build_engine
from pipeline.drafts import load_draft
from pipeline.engine import Engine
from pipeline.methods import method_named
from pipeline.models import resolve_model
from pipeline.request import Generation, Request, SamplingParams

_SAMPLED = {"temperature": 0.8, "top_p": 0.9}
_PROFILED_ROUNDS = 30
_PROMPTS_A_SLOT = 4
_LEAST_PROMPTS = 10
_PEER_PROMPTS = 3  # for `generate`, which takes longest


def main() -> None:
    """Command line."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--draft", help="draft head or model; the head shipped for the model if not given")
    arguments.add_argument("--methods", nargs="+", default=["plain", "context:8", "draft:16", "switch:16", "rasd"])
    arguments.add_argument("--slots", type=int, nargs="+", default=[1, 8, 32, 128])
    arguments.add_argument("--per-task", type=int, default=13)
    arguments.add_argument("--exact-per-task", type=int, default=2)
    arguments.add_argument("--max-new-tokens", type=int, default=96)
    arguments.add_argument("--repeats", type=int, default=2)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--output-profile", help="text file for the kernels of a round")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"max_new_tokens": options.max_new_tokens}
    bench = _Bench(options, torch.float32)
    results["equality"] = _equality(bench, bench.prompts(options.exact_per_task))
    bench = _Bench(options, torch.bfloat16)
    results["speed"] = _speed(bench, bench.prompts(options.per_task))
    report(results, options.output)


class _Bench:
    """A target in one dtype, and engines over it."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype) -> None:
        self.options = options
        self.dtype = dtype
        self.reference, self.tokenizer = load(options.model, dtype, options.device)

    def prompts(self, per_task: int) -> list[Prompt]:
        return load_prompts(self.options.prompts, self.tokenizer, per_task)

    def engine(self, name: str, slots: int) -> Engine:
        """`name` is METHOD or METHOD:BUDGET."""
        method_name, _, budget = name.partition(":")
        method = method_named(method_name, {"draft"})
        model, _ = load(self.options.model, self.dtype, self.options.device)
        draft = None
        if "draft" in method.sources:
            draft = load_draft(self.options.draft, model, resolve_model(self.options.model))
        chosen = EngineOptions(num_slots=slots, budget=int(budget) if budget else None, max_context=2048)
        return build_engine(model, self.tokenizer, method, chosen, (), draft)


def _requests(prompts: Sequence[Prompt], limit: int, **sampling: float) -> list[Request]:
    params = SamplingParams(max_new_tokens=limit, **sampling)
    return [Request(i, prompt.ids, params, seed=i) for i, prompt in enumerate(prompts)]


def _run(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    return sorted(engine.generate(requests), key=lambda generation: generation.request_id)


def _equality(bench: _Bench, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    if not prompts:
        return []
    limit = bench.options.max_new_tokens // 2
    greedy = [generate(bench.reference, prompt.ids, limit) for prompt in prompts]
    sampled = [list(g.token_ids) for g in _run(bench.engine("plain", 1), _requests(prompts, limit, **_SAMPLED))]
    rows = []
    for name in bench.options.methods:
        for slots in (1, 8):
            engine = bench.engine(name, slots)
            for kind, sampling, expected in (("greedy", {}, greedy), ("sampled", _SAMPLED, sampled)):
                requests = _requests(prompts, limit, **sampling)
                found = [
                    first_mismatch(bench.reference, p.ids, want, got.token_ids, r.params, r.seed if sampling else 0)
                    for p, want, got, r in zip(prompts, expected, _run(engine, requests), requests, strict=True)
                ]
                differ = [mismatch for mismatch in found if mismatch is not None]
                counted = sum(mismatch.counts for mismatch in differ)
                row = {"method": name, "slots": slots, "kind": kind, "prompts": len(prompts)}
                rows.append({**row, "differ_by_rounding": len(differ) - counted, "wrong": counted})
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _speed(bench: _Bench, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    rows = []
    for slots in bench.options.slots:
        # Several times as many prompts as slots, for a batch that ends together flatters plain decoding.
        chosen = random.Random(slots).choices(list(prompts), k=max(_PROMPTS_A_SLOT * slots, _LEAST_PROMPTS))
        engines = {name: bench.engine(name, slots) for name in bench.options.methods}
        runs = _runs(bench, engines, chosen, with_peer=slots == 1)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        tokens = {name: run() for name, run in runs.items()}  # compiles, and learns
        for engine in engines.values():
            engine.phases.seconds.clear()
        for _ in range(bench.options.repeats):
            for name, run in runs.items():
                begin = time.perf_counter()
                tokens[name] = run()
                seconds[name].append(time.perf_counter() - begin)
                print(
                    f"{slots} slots, {name}: {tokens[name] / seconds[name][-1]:.1f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
        rates = {name: tokens[name] / statistics.median(seconds[name]) for name in runs}
        for name, rate in rates.items():
            row: dict[str, Any] = {"slots": slots, "method": name, "tokens_per_second": round(rate, 1)}
            row["of_plain"] = round(rate / rates["plain"], 3)
            if name in engines:
                row |= _of_rounds(engines[name], slots, chosen, bench.options)
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return rows


def _runs(
    bench: _Bench, engines: dict[str, Engine], prompts: Sequence[Prompt], with_peer: bool
) -> dict[str, Callable[[], int]]:
    """What to time, by name; each returns how many tokens it made."""
    limit = bench.options.max_new_tokens
    runs: dict[str, Callable[[], int]] = {
        name: lambda engine=engine: _num_tokens(_run(engine, _requests(prompts, limit)))
        for name, engine in engines.items()
    }
    if with_peer:
        few = prompts[:_PEER_PROMPTS]
        runs["hf-generate"] = lambda: sum(len(generate(bench.reference, prompt.ids, limit)) for prompt in few)
    return runs


def _num_tokens(done: Sequence[Generation]) -> int:
    return sum(len(generation.token_ids) for generation in done)


def _of_rounds(engine: Engine, slots: int, prompts: Sequence[Prompt], options: argparse.Namespace) -> dict[str, Any]:
    """Shares of a round by phase; then one more run under the profiler, for how long the GPU computes."""
    total = sum(engine.phases.seconds.values())
    phases = {name: round(seconds / total, 3) for name, seconds in engine.phases.seconds.items()}
    activities = [ProfilerActivity.CUDA] if options.device == "cuda" else [ProfilerActivity.CPU]
    requests = _requests(prompts[:slots], _PROFILED_ROUNDS)
    with profile(activities=activities) as profiler:
        begin = time.perf_counter()
        done = _run(engine, requests)
        wall = time.perf_counter() - begin
    rounds = max(generation.rounds for generation in done)
    averages = profiler.key_averages()
    busy = sum(entry.self_device_time_total for entry in averages) / 1e6
    found = {"phases": phases, "tau": round(sum(len(g.token_ids) - 1 for g in done) / sum(g.rounds for g in done), 3)}
    if options.device != "cuda":
        return found
    kernels = sum(entry.count for entry in averages if entry.self_device_time_total > 0)
    if options.output_profile:
        with open(options.output_profile, "a", encoding="utf-8") as file:
            table = averages.table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=90)
            file.write(f"{slots} slots\n{table}\n")
    return {**found, "gpu_busy": round(busy / wall, 3), "kernels_a_round": round(kernels / max(rounds, 1))}


if __name__ == "__main__":
    main()
