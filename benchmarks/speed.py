"""How fast is the engine against transformers' `generate`? Ratios within one run, prompts interleaved.

    python -m benchmarks.speed --prompts FILES... --output benchmarks/results/speed.json

1. plain: plain decoding at one slot against greedy `generate`.
2. context: context lookup at one slot against `generate(prompt_lookup_num_tokens=10)`, docqa and summary prompts.
3. batch: 64 prompts of mixed length at 16 slots, natural ends, against `generate` in static left-padded batches of 16.
   A static batch runs as long as its longest output, so continuous batching can win by
   R = 16 x (sum of each batch's longest output) / (all output tokens), beyond what its steps cost.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.common import Prompt, engine_for, load, load_prompts, parser, report
from benchmarks.reference import generate
from pipeline.engine import Engine
from pipeline.request import Generation, Request, SamplingParams

_BATCH = 16


def main() -> None:
    """Command line."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument(
        "--parts", nargs="+", choices=["plain", "context", "batch"], default=["plain", "context", "batch"]
    )
    arguments.add_argument(
        "--max-new-tokens", type=int, default=256, help="of the batch part; the others take a quarter"
    )
    arguments.add_argument("--per-task", type=int, default=2, help="prompts a task of the plain part")
    arguments.add_argument("--context-per-task", type=int, default=8, help="prompts a task of the context part")
    arguments.add_argument("--dtype", default="bfloat16")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    parts = {"plain": _plain, "context": _context, "batch": _batch}
    results = {"dtype": options.dtype}
    for name in options.parts:
        results[name] = parts[name](options)
        print(name, results[name], file=sys.stderr)
    report(results, options.output)


def _plain(options: Any) -> dict[str, Any]:
    return _one_slot(options, "plain", {}, options.per_task, ())


def _context(options: Any) -> dict[str, Any]:
    tasks = ("docqa", "summary")
    return _one_slot(options, "context", {"prompt_lookup_num_tokens": 10}, options.context_per_task, tasks)


def _one_slot(
    options: Any, method: str, peer_options: dict[str, Any], per_task: int, tasks: Sequence[str]
) -> dict[str, Any]:
    """Our `method` against `generate` with `peer_options`, prompt by prompt in random order, natural ends."""
    dtype = getattr(torch, options.dtype)
    limit = options.max_new_tokens // 4
    model, tokenizer = load(options.model, dtype)
    engine = engine_for(options.model, dtype, method, 1)
    prompts = load_prompts(options.prompts, tokenizer, per_task, tasks)
    ours: list[float] = []
    peers: list[float] = []
    generations: list[Generation] = []

    def run_ours(prompt: Prompt) -> int:
        generations.extend(engine.generate([Request(0, prompt.ids, SamplingParams(max_new_tokens=limit))]))
        return len(generations[-1].token_ids)

    def run_peer(prompt: Prompt) -> int:
        return len(generate(model, prompt.ids, limit, **peer_options))

    run_ours(prompts[0])
    run_peer(prompts[0])
    generations.clear()
    for prompt in prompts:
        runs = [(run_ours, ours), (run_peer, peers)]
        random.shuffle(runs)
        for run, rates in runs:
            rates.append(_rate(run, prompt))
    ratios = [a / b for a, b in zip(ours, peers, strict=True)]
    rounds = sum(generation.rounds for generation in generations)
    tokens = sum(len(generation.token_ids) for generation in generations)
    return {
        "prompts": len(prompts),
        "ours_tokens_per_second": round(statistics.harmonic_mean(ours), 2),
        "peer_tokens_per_second": round(statistics.harmonic_mean(peers), 2),
        "ratio": round(statistics.harmonic_mean(ours) / statistics.harmonic_mean(peers), 3),
        "ratio_by_task": _by_task(prompts, ours, peers),
        "median_ratio": round(statistics.median(ratios), 3),
        "tau": round((tokens - len(generations)) / max(rounds, 1), 3),
    }


def _rate(run: Callable[[Prompt], int], prompt: Prompt) -> float:
    begin = time.perf_counter()
    tokens = run(prompt)
    return tokens / (time.perf_counter() - begin)


def _by_task(prompts: Sequence[Prompt], ours: Sequence[float], peers: Sequence[float]) -> dict[str, float]:
    ratios: dict[str, float] = {}
    for task in sorted({prompt.task for prompt in prompts}):
        index = [i for i, prompt in enumerate(prompts) if prompt.task == task]
        mean = statistics.harmonic_mean
        ratios[task] = round(mean([ours[i] for i in index]) / mean([peers[i] for i in index]), 3)
    return ratios


def _batch(options: Any) -> dict[str, Any]:
    dtype = getattr(torch, options.dtype)
    model, tokenizer = load(options.model, dtype)
    prompts = load_prompts(options.prompts, tokenizer, 8)
    random.Random(0).shuffle(prompts)
    prompts = prompts[:64]
    ours, generations = {}, {}
    for method in ("plain", "context"):
        engine = engine_for(options.model, dtype, method, _BATCH)
        list(engine.generate([Request(0, prompts[0].ids, SamplingParams(max_new_tokens=4))]))
        ours[method], generations[method] = _continuous(engine, prompts, options.max_new_tokens)
    peer_seconds, peer_tokens, longest = _static(model, prompts, options.max_new_tokens)
    slack = _BATCH * longest / peer_tokens
    rates = {method: sum(len(g.token_ids) for g in generations[method]) / ours[method] for method in ours}
    peer_rate = peer_tokens / peer_seconds
    return {
        "prompts": len(prompts),
        "R": round(slack, 3),
        "peer_tokens_per_second": round(peer_rate, 2),
        "ours_tokens_per_second": {method: round(rate, 2) for method, rate in rates.items()},
        "ratio": {method: round(rate / peer_rate, 3) for method, rate in rates.items()},
        "ratio_over_R": {method: round(rate / peer_rate / slack, 3) for method, rate in rates.items()},
    }


def _continuous(engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int) -> tuple[float, list[Generation]]:
    params = SamplingParams(max_new_tokens=max_new_tokens)
    begin = time.perf_counter()
    generations = list(engine.generate([Request(i, prompt.ids, params) for i, prompt in enumerate(prompts)]))
    return time.perf_counter() - begin, generations


def _static(model: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> tuple[float, int, int]:
    """Seconds, output tokens up to each end, and the sum over batches of the longest output."""
    pad = model.generation_config.pad_token_id
    seconds, tokens, longest = 0.0, 0, 0
    ends = set(torch.tensor(model.generation_config.eos_token_id).flatten().tolist())
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        width = max(len(prompt.ids) for prompt in batch)
        ids = torch.tensor([[pad] * (width - len(prompt.ids)) + list(prompt.ids) for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch])
        begin = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        seconds += time.perf_counter() - begin
        lengths = []
        for row in output[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            lengths.append(end)
        tokens += sum(lengths)
        longest += max(lengths)
    return seconds, tokens, longest


if __name__ == "__main__":
    main()
