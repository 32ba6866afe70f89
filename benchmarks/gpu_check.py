"""Is rasd right on a GPU, and how fast? Needs torch, transformers, numpy, numba, safetensors; nothing of Ray or FAISS.

    make gpu-check PROMPTS="FILES..." RECORDING=DIRECTORY [MODEL=NAME|DIRECTORY|FILE.gguf]

1. Equality: greedy output of every method in fp32 against transformers' `generate`, sampled output against our plain
   decoding at one slot; a difference counts as in `benchmarks.reference`.
2. Speed in bf16: every method at every slot count, each ratio to plain decoding at the same slots in the same run, and
   at one slot to `generate`; where a round's time goes, and for how much of it the GPU computes.
3. The same for a model of Llama-8B's shape that says what a recording says; see `benchmarks.gpu_played`.
4. What a pass takes, see `benchmarks.gpu_passes`, beside the card's measured ceilings.

It ends within --minutes: what there is no time for is named in the results.
"""

import argparse
import contextlib
import gc
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_passes
from benchmarks.common import Prompt, load, load_prompts, machine, parser, report
from benchmarks.gpu_markdown import markdown
from benchmarks.gpu_played import played_engine, played_requests, read
from benchmarks.gpu_race import Deadline, race, run, say
from benchmarks.recorded_lookups import RecordedLookups
from benchmarks.reference import first_mismatch, generate
from pipeline.assemble import EngineOptions, build_engine
from pipeline.drafts import load_draft
from pipeline.engine import Engine
from pipeline.methods import method_named
from pipeline.models import resolve_model
from pipeline.replay import Recording
from pipeline.request import Request, SamplingParams

_SAMPLED = {"temperature": 0.8, "top_p": 0.9}
_EAGER = "plain-eager"
_REQUESTS_A_SLOT = 4  # a batch that ends together flatters plain decoding
_LEAST_REQUESTS = 10
_PEER_PROMPTS = 3  # for `generate`, which takes longest
_PLAYED_METHODS = ("plain", "rasd")
# Seconds that a measurement is not begun without.
_FOR_EQUALITY, _FOR_RACE, _FOR_PASSES = 10, 40, 40


def main() -> None:
    """Command line."""
    options = _options()
    torch.set_num_threads(options.threads)
    deadline = Deadline(60 * options.minutes)
    recording, lookups = read(options.recording) if options.recording else (None, None)
    results: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "model": options.model}
    bench = _Bench(options, torch.float32, lookups)
    results["equality"] = _equality(bench, bench.prompts(options.exact_per_task), deadline)
    bench = _Bench(options, torch.bfloat16, lookups)
    prompts = bench.prompts(options.per_task)
    results |= {"speed": [], "played": [], "skipped": deadline.skipped}
    _write(results, options)
    for slots in options.slots:  # both models at few slots before any at many
        with _fitting(f"{options.model} at {slots} slots", deadline, _FOR_RACE) as is_on:
            if is_on:
                results["speed"] += [{"slots": slots, **row} for row in _speed(bench, prompts, slots)]
        _write(results, options)
        with _fitting(f"{options.shape} at {slots} slots", deadline, _FOR_RACE) as is_on:
            if is_on and recording is not None:
                results["played"] += [{"slots": slots, **row} for row in _played(options, recording, lookups, slots)]
        _write(results, options)
    with _fitting("passes", deadline, _FOR_PASSES) as is_on:
        if is_on:
            results["passes"] = _passes(options)
    say(_write(results, options))
    report(results, None)


@contextlib.contextmanager
def _fitting(what: str, deadline: Deadline, seconds: float) -> Iterator[bool]:
    """A measurement: whether there is time for it. One that memory is too short for is named as left out, too."""
    try:
        yield deadline.allows(what, seconds)
    except torch.OutOfMemoryError as error:
        deadline.skipped.append(f"{what} (no memory)")
        say(f"no memory for {what}: {error}")
    gc.collect()  # engines are cycles, and their pools are large
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write(results: Mapping[str, Any], options: argparse.Namespace) -> str:
    """What there is so far, so that a run that is ended loses none of it; returns the page."""
    text = markdown({"machine": machine(), "shape": options.shape, **results})
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".md").write_text(text)
        options.output.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    return text


def _options() -> argparse.Namespace:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--draft", help="draft head or model; the head shipped for the model if not given")
    arguments.add_argument("--recording", type=Path, help="directory that benchmarks.gpu_recording wrote")
    methods = ["plain", _EAGER, "context:8", "draft:16", "switch:16", "rasd"]
    arguments.add_argument("--methods", nargs="+", default=methods, help="METHOD or METHOD:BUDGET, plain first")
    arguments.add_argument("--slots", type=int, nargs="+", default=[1, 32, 128, 8])
    arguments.add_argument("--per-task", type=int, default=13)
    arguments.add_argument("--exact-per-task", type=int, default=1)
    arguments.add_argument("--max-new-tokens", type=int, default=96)
    arguments.add_argument("--repeats", type=int, default=2)
    arguments.add_argument("--shape", choices=list(gpu_passes.SHAPES), default="llama-8b", help="of the played model")
    arguments.add_argument("--minutes", type=float, default=8.0)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--profile", type=Path, help="text file for the kernels of rounds")
    options = arguments.parse_args()
    if options.methods[0] != "plain":
        arguments.error(f"--methods begins with {options.methods[0]!r}; plain comes first, all ratios are to it")
    return options


class _Bench:
    """A target in one dtype, and engines over it."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype, lookups: RecordedLookups | None) -> None:
        self.options = options
        self.dtype = dtype
        self._lookups = lookups
        self.reference, self.tokenizer = load(options.model, dtype, options.device)

    def prompts(self, per_task: int) -> list[Prompt]:
        return load_prompts(self.options.prompts, self.tokenizer, per_task)

    def engine(self, name: str, slots: int) -> Engine:
        """`name` is METHOD or METHOD:BUDGET."""
        method_name, _, budget = name.removesuffix("-eager").partition(":")
        method = method_named(method_name, {"draft"} | ({"corpus"} if self._lookups is not None else set()))
        model, _ = load(self.options.model, self.dtype, self.options.device)
        draft = None
        if "draft" in method.sources:
            draft = load_draft(self.options.draft, model, resolve_model(self.options.model))
        searchers = (self._lookups,) if self._lookups is not None and "corpus" in method.sources else ()
        is_static = False if name == _EAGER else None
        chosen = EngineOptions(slots, int(budget) if budget else None, max_context=2048, is_static=is_static)
        return build_engine(model, self.tokenizer, method, chosen, searchers, draft)


def _requests(prompts: Sequence[Prompt], limit: int, **sampling: float) -> list[Request]:
    params = SamplingParams(max_new_tokens=limit, **sampling)  # type: ignore[arg-type]
    return [Request(i, prompt.ids, params, seed=i) for i, prompt in enumerate(prompts)]


def _equality(bench: _Bench, prompts: Sequence[Prompt], deadline: Deadline) -> list[dict[str, Any]]:
    if not prompts:
        return []
    limit = bench.options.max_new_tokens // 2
    greedy = [generate(bench.reference, prompt.ids, limit) for prompt in prompts]
    sampled = [list(g.token_ids) for g in run(bench.engine("plain", 1), _requests(prompts, limit, **_SAMPLED))]
    rows = []
    for name in bench.options.methods:
        for slots in (1, 8):
            if not deadline.allows(f"equality of {name} at {slots} slots", _FOR_EQUALITY):
                continue
            engine = bench.engine(name, slots)
            for kind, sampling, expected in (("greedy", {}, greedy), ("sampled", _SAMPLED, sampled)):
                requests = _requests(prompts, limit, **sampling)
                found = [
                    first_mismatch(bench.reference, p.ids, want, got.token_ids, r.params, r.seed if sampling else 0)
                    for p, want, got, r in zip(prompts, expected, run(engine, requests), requests, strict=True)
                ]
                differ = [mismatch for mismatch in found if mismatch is not None]
                counted = sum(mismatch.counts for mismatch in differ)
                row = {"method": name, "slots": slots, "kind": kind, "prompts": len(prompts)}
                rows.append({**row, "differ_by_rounding": len(differ) - counted, "wrong": counted})
                say(rows[-1])
    return rows


def _speed(bench: _Bench, prompts: Sequence[Prompt], slots: int) -> list[dict[str, Any]]:
    options = bench.options
    count = max(_REQUESTS_A_SLOT * slots, _LEAST_REQUESTS)
    chosen = random.Random(slots).choices(list(prompts), k=count)
    engines = {name: bench.engine(name, slots) for name in options.methods}
    limit = options.max_new_tokens
    rows = race(engines, _requests(chosen, limit), options.repeats, profile_to=options.profile)
    if slots == 1:  # against plain decoding of the same few prompts
        few = chosen[:_PEER_PROMPTS]
        peers = {"hf-generate": lambda: sum(len(generate(bench.reference, prompt.ids, limit)) for prompt in few)}
        rows += race({"plain": engines["plain"]}, _requests(few, limit), options.repeats, peers)[1:]
    return rows


def _played(
    options: argparse.Namespace, recording: Recording, lookups: RecordedLookups, slots: int
) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    engines: dict[str, Engine] = {
        name: played_engine(
            gpu_passes.random_model(options.shape, device, torch.bfloat16), recording, name, slots, lookups
        )
        for name in _PLAYED_METHODS
    }
    requests = played_requests(recording, max(_REQUESTS_A_SLOT // 2 * slots, _LEAST_REQUESTS))
    return race(engines, requests, options.repeats, profile_to=options.profile)


def _passes(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    return {
        "ceilings": gpu_passes.ceilings(device),
        "curve": gpu_passes.curve(options.shape, device, slots=(1, 32, 128), nodes=(0, 7)),
    }


if __name__ == "__main__":
    main()
