"""What each source is worth: tau on prompts with the context alone, then passages, corpus and live outputs added."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from actors.searchers import LocalSearcher
from benchmarks.common import Prompt, load
from datastore import Datastore, LiveStore
from pipeline.assemble import EngineOptions, build_engine
from pipeline.methods import Method
from pipeline.request import Generation, Request, SamplingParams

STEPS = {
    "context": ("context",),
    "+passages": ("context", "passages"),
    "+corpus": ("context", "passages", "corpus"),
    "+live": ("context", "passages", "corpus", "live"),
    "corpus alone": ("corpus",),
}


def measure(
    model: str, prompts: Sequence[Prompt], store: Datastore, slots: int, budget: int, max_new_tokens: int, k: int
) -> dict[str, Any]:
    """Greedy bf16 decoding of the same prompts, in the same order, with each set of sources.

    Returns:
        tau by task and over all, accepted tokens by source, and tokens a second, for each step.
    """
    found = store.search([prompt.question for prompt in prompts], k)
    passages = [tuple(passage.tokens for passage in row) for row in found]
    results = {}
    for name, sources in STEPS.items():
        live = LiveStore(store.manifest.vocab_size) if "live" in sources else None
        searcher = LocalSearcher(store if "corpus" in sources else None, live)
        searchers = [searcher] if {"corpus", "live"} & set(sources) else []
        loaded, tokenizer = load(model, torch.bfloat16)  # anew each time: an engine changes its model's attention
        options = EngineOptions(num_slots=slots, budget=budget, max_context=2048)
        engine = build_engine(loaded, tokenizer, Method(name, name, sources), options, searchers)
        params = SamplingParams(max_new_tokens=max_new_tokens)
        requests = [
            Request(i, prompt.ids, params, 0, passages[i] if "passages" in sources else ())
            for i, prompt in enumerate(prompts)
        ]
        done: dict[int, Generation] = {}
        begin = time.perf_counter()
        for generation in engine.generate(requests):
            done[generation.request_id] = generation
            if live is not None:
                live.append([np.asarray(generation.token_ids, np.int32)])
        seconds = time.perf_counter() - begin
        results[name] = _summary(prompts, [done[i] for i in range(len(prompts))], seconds)
    return {"slots": slots, "budget": budget, "max_new_tokens": max_new_tokens, "passages": k, "steps": results}


def _summary(prompts: Sequence[Prompt], done: Sequence[Generation], seconds: float) -> dict[str, Any]:
    by_source: dict[str, int] = {}
    for generation in done:
        for source, count in generation.accepted_by_source.items():
            by_source[source] = by_source.get(source, 0) + count
    tasks = sorted({prompt.task for prompt in prompts})
    by_task = {t: _tau([g for g, prompt in zip(done, prompts, strict=True) if prompt.task == t]) for t in tasks}
    return {
        "tau": _tau(done),
        "tau_by_task": by_task,
        "accepted_by_source": by_source,
        "tokens_per_second": round(sum(len(g.token_ids) for g in done) / seconds, 1),
    }


def _tau(generations: Sequence[Generation]) -> float:
    rounds = sum(generation.rounds for generation in generations)
    return round(sum(len(generation.token_ids) - 1 for generation in generations) / max(rounds, 1), 3)
