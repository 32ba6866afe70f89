"""What drafters are worth: tau and tokens a second of each, greedy and sampled, on the same prompts.

    python -m benchmarks.drafters --prompts PROMPTS/*.jsonl --heads HEAD --output benchmarks/results/drafters.json

`target` drafts with the target itself, an upper bound that checks the plumbing; `skipped` with a copy of it without
some of its layers, a real and imperfect draft model. `top1` is the share of rounds whose likeliest first token was
accepted, from runs with a budget of one node. `uncoupled` ranks candidates of sampled requests without the noise that
the target's own choice will use.
"""

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.common import Prompt, load, load_prompts, parser, report
from pipeline.assemble import EngineOptions, build_engine
from pipeline.engine import Engine
from pipeline.growth import DraftOptions
from pipeline.head import DraftHead
from pipeline.head_files import load_head
from pipeline.methods import Method
from pipeline.models import load_tokenizer, resolve_model
from pipeline.request import Generation, Request, SamplingParams

_STEP_PROMPT = 256  # tokens of context while steps are timed
_STEP_ROUNDS = 48


@dataclass(frozen=True, slots=True)
class Entry:
    """One way of drafting.

    Attributes:
        sources: who proposes.
        draft: from the target to what drafts for it.
        is_coupled: see `DraftOptions`.
    """

    sources: tuple[str, ...]
    draft: Callable[[PreTrainedModel], PreTrainedModel | DraftHead | None] = lambda _: None
    is_coupled: bool = True


def main() -> None:
    """Command line."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--per-task", type=int, default=4)
    arguments.add_argument("--skip", type=int, default=0, help="prompts of each task passed over first")
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
    entries = {name: e for name, e in _entries(options).items() if not options.only or name in options.only}
    tokenizer = load_tokenizer(resolve_model(options.model))
    prompts = load_prompts(options.prompts, tokenizer, options.per_task, skip=options.skip)
    runs: dict[str, Any] = {}
    for temperature in options.temperatures:
        for name, entry in entries.items():
            if temperature == 0.0 and not entry.is_coupled:
                continue  # the same thing
            key = f"{name} T={temperature:g}"
            runs[key] = _measure(options, prompts, entry, temperature, options.budget)
            if entry.sources == ("draft",):
                single = _measure(options, prompts, entry, temperature, 1)
                runs[key] |= {"top1": single["acceptance"], "top1_by_task": single["acceptance_by_task"]}
            print(key, runs[key], file=sys.stderr)
    results = {"budget": options.budget, "slots": options.slots, "dtype": options.dtype, "runs": runs}
    if options.heads:
        heads = {name: entry for name, entry in entries.items() if name.startswith("head") and entry.is_coupled}
        results["steps"] = {name: _steps(options, entry) for name, entry in heads.items()}
    report(results, options.output)


def _entries(options: Any) -> dict[str, Entry]:
    target_hash = resolve_model(options.model).hash
    entries = {
        "plain": Entry(()),
        "context": Entry(("context",)),
        "target": Entry(("draft",), lambda _: load(options.model, getattr(torch, options.dtype))[0]),
        "skipped": Entry(("draft",), lambda target: skipped(target, options.drop_every)),
    }
    for path in map(Path, options.heads):

        def draft(target: PreTrainedModel, path: Path = path) -> DraftHead:
            return load_head(path, target, target_hash)

        entries[f"head {path.name}"] = Entry(("draft",), draft)
        entries[f"head {path.name} uncoupled"] = Entry(("draft",), draft, is_coupled=False)
    return entries


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


def _engine(options: Any, entry: Entry, budget: int, slots: int, drafting: DraftOptions) -> Engine:
    loaded, tokenizer = load(options.model, getattr(torch, options.dtype))
    engine_options = EngineOptions(num_slots=slots, budget=budget, max_context=2048, drafting=drafting)
    method = Method("measured", "", entry.sources)
    return build_engine(loaded, tokenizer, method, engine_options, draft=entry.draft(loaded))


def _measure(options: Any, prompts: Sequence[Prompt], entry: Entry, temperature: float, budget: int) -> dict[str, Any]:
    engine = _engine(options, entry, budget, options.slots, DraftOptions(is_coupled=entry.is_coupled))
    params = SamplingParams(max_new_tokens=options.max_new_tokens, temperature=temperature)
    list(engine.generate([Request(0, prompts[0].ids, SamplingParams(max_new_tokens=4))]))
    begin = time.perf_counter()
    done = sorted(
        engine.generate([Request(i, prompt.ids, params, seed=i) for i, prompt in enumerate(prompts)]),
        key=lambda generation: generation.request_id,
    )
    seconds = time.perf_counter() - begin
    return _summary(prompts, done, seconds)


def _steps(options: Any, entry: Entry) -> dict[str, float]:
    """Medians in ms at one slot: a plain step of the target, and a draft of one level and of five, interleaved."""
    plain = _engine(options, Entry(()), 0, 1, DraftOptions())
    drafting = {depth: _engine(options, entry, 1, 1, DraftOptions(depth=depth)) for depth in (1, 5)}
    prompt = tuple(range(1000, 1000 + _STEP_PROMPT))
    times: dict[str, list[float]] = {"target": [], "draft 1": [], "draft 5": []}
    timed(plain.target, "forward", times["target"])
    for depth, engine in drafting.items():
        timed(engine.drafter, "draft", times[f"draft {depth}"])
    engines = [plain, *drafting.values()]
    for engine in engines:
        engine.submit(Request(0, prompt, SamplingParams(max_new_tokens=_STEP_ROUNDS, ignore_eos=True)))
    while any(engine.has_work for engine in engines):
        for engine in engines:
            if engine.has_work:
                engine.step()
    median = {name: 1e3 * float(np.median(values[2:])) for name, values in times.items()}
    median["draft 1 / target"] = median["draft 1"] / median["target"]
    median["level / target"] = median["draft 5"] / 5 / median["target"]
    return {name: round(value, 4) for name, value in median.items()}


def timed(owner: Any, name: str, seconds: list[float]) -> None:
    """Replaces a method by one that also notes how long each call took."""
    method = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        result = method(*arguments, **options)
        seconds.append(time.perf_counter() - begin)
        return result

    setattr(owner, name, call)


def _summary(prompts: Sequence[Prompt], done: Sequence[Generation], seconds: float) -> dict[str, Any]:
    by_task = {
        task: [g for g, prompt in zip(done, prompts, strict=True) if prompt.task == task]
        for task in sorted({prompt.task for prompt in prompts})
    }
    return {
        "tau": _tau(done),
        "tau_by_task": {task: _tau(generations) for task, generations in by_task.items()},
        "acceptance": _acceptance(done),
        "acceptance_by_task": {task: _acceptance(generations) for task, generations in by_task.items()},
        "tokens_per_second": round(sum(len(g.token_ids) for g in done) / seconds, 1),
    }


def _tau(generations: Sequence[Generation]) -> float:
    rounds = sum(generation.rounds for generation in generations)
    return round(sum(len(generation.token_ids) - 1 for generation in generations) / max(rounds, 1), 3)


def _acceptance(generations: Sequence[Generation]) -> float:
    """Drafted tokens kept a round."""
    return round(sum(g.accepted for g in generations) / max(sum(g.rounds for g in generations), 1), 3)


if __name__ == "__main__":
    main()
