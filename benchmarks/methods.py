"""What methods are worth against plain decoding: tokens a second, paired per prompt, methods interleaved, one machine.

    python -m benchmarks.methods --prompts PROMPTS/*.jsonl --datastore STORE --slots 1 \\
        --methods plain context:8 corpus:8 draft:12 switch:16 rasd-fixed:16 rasd --output methods.json

A method may keep some of its sources only (`rasd-fixed@draft+context`) and be followed by its fixed budget, which `rasd
simulate` finds on other prompts; without one it tunes itself. Every repeat begins with new engines: nothing is learned,
cached or found from an earlier one. At one slot a sample is one prompt; at more, one batch of a task's prompts. The
ratio over a set is that of summed times; its 95% interval is a bootstrap over the set's prompts, whose time is the
median of its repeats.
"""

import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.common import Prompt, load, load_prompts, parser, report
from datastore import Datastore, LiveStore
from jobs.simulate import local_search, run
from pipeline.assemble import EngineOptions, build_engine
from pipeline.drafts import load_draft
from pipeline.engine import Engine
from pipeline.methods import method_named
from pipeline.models import resolve_model
from pipeline.request import Generation, Request, SamplingParams

_RESAMPLES = 2000
_LONG = ("docqa", "summary", "rag")  # judged together, too


@dataclass(slots=True)
class Contender:
    """A method under test: its engine of this repeat, and over all repeats seconds by sample and by phase."""

    engine: Engine | None = None
    live: LiveStore | None = None
    seconds: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    done: dict[int, list[Generation]] = field(default_factory=dict)
    phases: Counter[str] = field(default_factory=Counter)


def main() -> None:
    """Command line."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--methods", nargs="+", default=["plain", "context", "draft", "switch", "rasd"])
    arguments.add_argument("--datastore", help="searched by the methods that have the source `corpus`")
    arguments.add_argument("--live", choices=("on", "off"), default="on")
    arguments.add_argument("--draft", help="draft head or model; the head shipped for the model if not given")
    arguments.add_argument("--per-task", type=int, default=1)
    arguments.add_argument("--skip", type=int, default=0, help="prompts of each task passed over first")
    arguments.add_argument("--tasks", nargs="*", default=())
    arguments.add_argument(
        "--random-words", type=int, default=0, help="prompts of random tokens, as a task of their own"
    )
    arguments.add_argument("--max-new-tokens", type=int, default=64)
    arguments.add_argument("--temperature", type=float, default=0.0)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--slots", type=int, default=1)
    arguments.add_argument("--dtype", default="bfloat16")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    _, tokenizer = load(options.model, getattr(torch, options.dtype))
    prompts = load_prompts(options.prompts, tokenizer, options.per_task, options.tasks, options.skip)
    prompts += _random_words(options.random_words)
    samples = [[prompt] for prompt in prompts]
    if options.slots > 1:
        samples = [[p for p in prompts if p.task == task] for task in sorted({p.task for p in prompts})]
    store = Datastore.open(options.datastore, dense=False) if options.datastore else None
    contenders = {name: Contender() for name in options.methods}
    params = SamplingParams(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    for repeat in range(options.repeats):
        for name, contender in contenders.items():
            _renew(contender, options, name, store)
            _run(contender, [_random_words(1)[0]], SamplingParams(max_new_tokens=16))  # compiles
        for number, sample in enumerate(samples):
            order = list(contenders)
            random.Random(1000 * repeat + number).shuffle(order)
            for name in order:
                contender = contenders[name]
                begin = time.perf_counter()
                contender.done[number] = _run(contender, sample, params)
                contender.seconds[number].append(time.perf_counter() - begin)
        for contender in contenders.values():
            assert contender.engine is not None
            contender.phases.update(contender.engine.phases.seconds)
        print(f"repeat {repeat + 1} of {options.repeats}", file=sys.stderr)
    names = ("slots", "dtype", "temperature", "max_new_tokens", "per_task", "skip", "repeats", "live")
    facts = {name: getattr(options, name) for name in names}
    report({**facts, "has_datastore": store is not None, "methods": _results(contenders, samples)}, options.output)


def _renew(contender: Contender, options: Any, name: str, store: Datastore | None) -> None:
    """Gives a contender a new engine and an empty live store."""
    method_name, _, budget = name.partition(":")
    provided = {"draft"} | ({"corpus"} if store is not None else set()) | ({"live"} if options.live == "on" else set())
    method = method_named(method_name, provided)
    model, tokenizer = load(options.model, getattr(torch, options.dtype))
    draft = load_draft(options.draft, model, resolve_model(options.model)) if "draft" in method.sources else None
    searchers, contender.live = local_search(method, store, model.config.vocab_size)
    chosen = EngineOptions(num_slots=options.slots, budget=int(budget) if budget else None, max_context=2048)
    contender.engine = build_engine(model, tokenizer, method, chosen, searchers, draft)


def _run(contender: Contender, sample: Sequence[Prompt], params: SamplingParams) -> list[Generation]:
    assert contender.engine is not None
    requests = [Request(i, prompt.ids, params, seed=i) for i, prompt in enumerate(sample)]
    return run(contender.engine, requests, contender.live)


def _random_words(count: int) -> list[Prompt]:
    """Prompts in which nothing repeats and after which nothing is likely."""
    draws = np.random.default_rng(0).integers(1000, 48000, (count, 120))
    return [Prompt(f"random-{i}", "random", tuple(row.tolist())) for i, row in enumerate(draws)]


def _results(contenders: Mapping[str, Contender], samples: Sequence[Sequence[Prompt]]) -> dict[str, Any]:
    tasks = [sample[0].task for sample in samples]
    sets = {task: [i for i, own in enumerate(tasks) if own == task] for task in sorted(set(tasks))}
    everything = [i for i, task in enumerate(tasks) if task != "random"]
    sets = {"all": everything, "long": [i for i in everything if tasks[i] in _LONG], **sets}
    plain = contenders.get("plain")
    return {name: _figures(contender, plain, sets) for name, contender in contenders.items()}


def _figures(contender: Contender, plain: Contender | None, sets: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    total = sum(contender.phases.values())
    return {
        "sets": {name: _of_set(contender, plain, chosen) for name, chosen in sets.items() if chosen},
        "phases": {name: round(seconds / total, 4) for name, seconds in contender.phases.items()},
    }


def _of_set(contender: Contender, plain: Contender | None, chosen: Sequence[int]) -> dict[str, Any]:
    done = [generation for i in chosen for generation in contender.done[i]]
    own = np.array([statistics.median(contender.seconds[i]) for i in chosen])
    rounds = max(sum(generation.rounds for generation in done), 1)
    figures: dict[str, Any] = {
        "tokens_per_second": round(sum(len(g.token_ids) for g in done) / float(own.sum()), 2),
        "tau": round(sum(len(g.token_ids) - 1 for g in done) / rounds, 3),
        "nodes": round(sum(g.drafted for g in done) / rounds, 2),
    }
    if plain is not None:
        base = np.array([statistics.median(plain.seconds[i]) for i in chosen])
        figures["ratio"] = round(float(base.sum() / own.sum()), 3)
        figures["interval"] = _interval(contender, plain, chosen)
    return figures


def _interval(contender: Contender, plain: Contender, chosen: Sequence[int]) -> list[float]:
    """Bootstrap over prompts, and over the repeats of each."""
    own = np.array([contender.seconds[i] for i in chosen])  # [prompts, repeats]
    base = np.array([plain.seconds[i] for i in chosen])
    random_state = np.random.default_rng(0)
    ratios = []
    for _ in range(_RESAMPLES):
        rows = random_state.integers(0, len(own), len(own))
        repeats = random_state.integers(0, own.shape[1], own.shape[1])
        medians = [np.median(seconds[rows][:, repeats], axis=1).sum() for seconds in (base, own)]
        ratios.append(medians[0] / medians[1])
    return [round(float(bound), 3) for bound in np.percentile(ratios, [2.5, 97.5])]


if __name__ == "__main__":
    main()
