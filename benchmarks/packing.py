"""Does cost follow the work? Ragged trees against even ones, and a common prefix against one prefill of it.

    python -m benchmarks.packing --prompts FILES... --output benchmarks/results/packing.json

1. ragged: a verification pass where one slot brings 48 nodes and 15 slots one each, against 63 nodes spread evenly.
2. prefix: 64 prompts of 502 tokens that share the first 500, one output token each, against one prompt of 500.
"""

import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.common import engine_for, load, parser, report
from pipeline.assemble import PAGE_SIZE
from pipeline.packing import Run, Runs
from pipeline.pages import PagePool, PageRun
from pipeline.request import Request, SamplingParams
from pipeline.target import Target
from pipeline.tree import EMPTY_TREE, TokenTree

_SLOTS = 16
_RAGGED = [48] + [1] * 15
_EVEN = [4] * 15 + [3]


def main() -> None:
    """Command line."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--context", type=int, default=400, help="cached tokens of each slot")
    arguments.add_argument("--repeats", type=int, default=30)
    arguments.add_argument("--dtype", default="bfloat16")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    results = {"dtype": options.dtype, "ragged": _ragged(options), "prefix": _prefix(options)}
    report(results, options.output)


def _ragged(options: Any) -> dict[str, Any]:
    model, _ = load(options.model, getattr(torch, options.dtype))
    target = Target(model, _SLOTS * (options.context // PAGE_SIZE + 4), PAGE_SIZE)
    pool = PagePool(target.num_pages, PAGE_SIZE)
    pages = [PageRun() for _ in range(_SLOTS)]
    for run in pages:
        assert pool.grow(run, options.context + 64)
        prompt = Run(np.arange(options.context, dtype=np.int32) + 100, EMPTY_TREE, 0, run, True)
        target.forward(Runs.of([prompt], PAGE_SIZE))

    def seconds(nodes: Sequence[int]) -> float:
        runs = [
            Run(np.array([5], np.int32), _tree(count - 1), options.context, run, True)
            for count, run in zip(nodes, pages, strict=True)
        ]
        columns = Runs.of(runs, PAGE_SIZE)
        begin = time.perf_counter()
        target.forward(columns)
        return time.perf_counter() - begin

    shapes = {"ragged": _RAGGED, "even": _EVEN}
    times: dict[str, list[float]] = {name: [] for name in shapes}
    for repeat in range(options.repeats + 3):
        for name in random.sample(list(shapes), 2):
            elapsed = seconds(shapes[name])
            if repeat >= 3:
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "rows": sum(_RAGGED),
        "ragged_ms": round(1e3 * medians["ragged"], 1),
        "even_ms": round(1e3 * medians["even"], 1),
        "ratio": round(medians["ragged"] / medians["even"], 3),
    }


def _tree(num_nodes: int) -> TokenTree:
    """A binary tree of `num_nodes`."""
    return TokenTree.of(
        [7 + i for i in range(num_nodes)], [(i - 2) // 2 if i >= 2 else -1 for i in range(num_nodes)], "draft"
    )


def _prefix(options: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    prefix = rng.integers(100, 40_000, 500).tolist()
    shared = [(*prefix, *rng.integers(100, 40_000, 2).tolist()) for _ in range(64)]
    params = SamplingParams(max_new_tokens=1)

    def seconds(prompts: Sequence[tuple[int, ...]]) -> float:
        engine = engine_for(options.model, getattr(torch, options.dtype), "plain", _SLOTS)
        list(engine.generate([Request(-1, (3, 4, 5), params)]))
        begin = time.perf_counter()
        list(engine.generate([Request(i, prompt, params) for i, prompt in enumerate(prompts)]))
        return time.perf_counter() - begin

    one, many = (statistics.median(seconds(prompts) for _ in range(3)) for prompts in ([tuple(prefix)], shared))
    return {
        "one_prefill_seconds": round(one, 3),
        "shared_64_seconds": round(many, 3),
        "shared_over_one": round(many / one, 2),
    }


if __name__ == "__main__":
    main()
