"""What drafters are worth: tau and tokens a second of each, greedy and sampled, on the same prompts.

    python -m benchmarks.drafters --prompts PROMPTS/*.jsonl --heads HEAD --output benchmarks/results/drafters.json

`target` drafts with the target itself, an upper bound that checks the plumbing; `skipped` with a copy of it without
some of its layers, a real and imperfect draft model. `top1` is the share of rounds whose likeliest first token was
accepted, from runs with a budget of one node.
"""

import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.common import Prompt, load, load_prompts, parser, report
from pipeline.assemble import EngineOptions, build_engine
from pipeline.head import DraftHead
from pipeline.head_files import load_head
from pipeline.methods import Method
from pipeline.models import resolve_model
from pipeline.request import Generation, Request, SamplingParams

Draft = Callable[[PreTrainedModel], PreTrainedModel | DraftHead | None]


def main() -> None:
    """Command line."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--per-task", type=int, default=4)
    arguments.add_argument("--max-new-tokens", type=int, default=64)
    arguments.add_argument("--slots", type=int, default=1)
    arguments.add_argument("--budget", type=int, default=32)
    arguments.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
    arguments.add_argument("--heads", nargs="*", default=[], help="directories of draft heads")
    arguments.add_argument("--drop-every", type=int, default=10, help="layers that `skipped` lacks: every so many")
    arguments.add_argument("--only", nargs="+", help="names of drafters; all if not given")
    arguments.add_argument("--dtype", default="bfloat16")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    target_hash = resolve_model(options.model).hash
    drafters: dict[str, tuple[tuple[str, ...], Draft]] = {
        "plain": ((), lambda _: None),
        "context": (("context",), lambda _: None),
        "target": (("draft",), lambda _: load(options.model, getattr(torch, options.dtype))[0]),
        "skipped": (("draft",), lambda target: skipped(target, options.drop_every)),
        **{f"head {Path(p).name}": (("draft",), _head(p, target_hash)) for p in options.heads},
    }
    drafters = {name: drafter for name, drafter in drafters.items() if not options.only or name in options.only}
    results: dict[str, Any] = {}
    for temperature in options.temperatures:
        for name, (sources, draft) in drafters.items():
            key = f"{name} T={temperature:g}"
            results[key] = _measure(options, sources, draft, temperature, options.budget)
            if sources == ("draft",):
                results[key]["top1"] = _measure(options, sources, draft, temperature, 1)["acceptance"]
            print(key, results[key], file=sys.stderr)
    report({"budget": options.budget, "slots": options.slots, "dtype": options.dtype, "runs": results}, options.output)


def skipped(target: PreTrainedModel, drop_every: int) -> PreTrainedModel:
    """A copy of a model without every `drop_every`th decoder layer; the first and the last stay."""
    model = copy.deepcopy(target)
    decoder: Any = model.get_decoder()
    last = len(decoder.layers) - 1
    kept = [i for i in range(last + 1) if i in (0, last) or i % drop_every != drop_every // 2]
    decoder.layers = torch.nn.ModuleList([decoder.layers[i] for i in kept])
    for place, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    return model


def _head(path: str, target_hash: str) -> Draft:
    return lambda target: load_head(Path(path), target, target_hash)


def _measure(options: Any, sources: tuple[str, ...], draft: Draft, temperature: float, budget: int) -> dict[str, Any]:
    loaded, tokenizer = load(options.model, getattr(torch, options.dtype))
    prompts = load_prompts(options.prompts, tokenizer, options.per_task)
    engine_options = EngineOptions(num_slots=options.slots, budget=budget, max_context=2048)
    drafting = draft(loaded)
    engine = build_engine(loaded, tokenizer, Method("measured", "", sources), engine_options, draft=drafting)
    params = SamplingParams(max_new_tokens=options.max_new_tokens, temperature=temperature)
    list(engine.generate([Request(0, prompts[0].ids, SamplingParams(max_new_tokens=4))]))
    begin = time.perf_counter()
    done = sorted(
        engine.generate([Request(i, prompt.ids, params, seed=i) for i, prompt in enumerate(prompts)]),
        key=lambda generation: generation.request_id,
    )
    seconds = time.perf_counter() - begin
    return _summary(prompts, done, seconds)


def _summary(prompts: Sequence[Prompt], done: Sequence[Generation], seconds: float) -> dict[str, Any]:
    tasks = sorted({prompt.task for prompt in prompts})
    rounds = sum(g.rounds for g in done)
    return {
        "tau": _tau(done),
        "tau_by_task": {
            t: _tau([g for g, prompt in zip(done, prompts, strict=True) if prompt.task == t]) for t in tasks
        },
        "acceptance": round(sum(g.accepted for g in done) / max(rounds, 1), 3),
        "tokens_per_second": round(sum(len(g.token_ids) for g in done) / seconds, 1),
    }


def _tau(generations: Sequence[Generation]) -> float:
    rounds = sum(generation.rounds for generation in generations)
    return round(sum(len(generation.token_ids) - 1 for generation in generations) / max(rounds, 1), 3)


if __name__ == "__main__":
    main()
