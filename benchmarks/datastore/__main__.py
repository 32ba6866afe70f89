"""The datastore's figures: building, lookups, the service, dense search, and what each source is worth.

    rasd datastore build --model smollm2-135m --corpus CORPORA SOURCES --dense off --segment-tokens 512M --output large
    rasd datastore build --model smollm2-135m --corpus CORPORA --output store
    python -m benchmarks.datastore --large large --store store --prompts PROMPTS/*.jsonl --focus-prompts QUESTIONS
        --focus-corpus DOCUMENTS --output benchmarks/results/datastore.json

`large` should have one segment of at least 20 M tokens; `store` has passages. Parts that lack their input are left out,
and so is what a part of `--parts` does not name.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.common import load_prompts, parser, report
from benchmarks.datastore import build, dense, focus, lookups, service, sources
from datastore import Datastore
from datastore.lookup import SegmentSet
from pipeline.models import load_tokenizer, resolve_model

PARTS = ("build", "lookups", "service", "dense", "focus", "sources")
_CONTEXTS = 64 * 400


def main() -> None:
    """Command line."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--large", type=Path, help="datastore with one large segment")
    arguments.add_argument("--store", type=Path, help="datastore with passages")
    arguments.add_argument("--focus-prompts", type=Path, help="JSON lines of {focus, messages}")
    arguments.add_argument("--focus-corpus", type=Path, help="JSON lines of {id, focus, text}, part of --store")
    arguments.add_argument("--questions", type=int, default=300)
    arguments.add_argument("--per-task", type=int, default=20)
    arguments.add_argument("--max-new-tokens", type=int, default=64)
    arguments.add_argument("--slots", type=int, default=16)
    arguments.add_argument("--budget", type=int, default=16)
    arguments.add_argument("--passages", type=int, default=4)
    options = arguments.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    for part in options.parts:
        measured = _MEASURES[part](options)
        if measured is not None:
            results[part] = measured
            print(part, json.dumps(measured), file=sys.stderr)
    report(results, options.output)


def _build(options: Any) -> dict[str, Any] | None:
    if options.large is None:
        return None
    opened = Datastore.open(options.large, dense=False)
    tokens, offsets = opened.segments[0].segment.plain()
    with tempfile.TemporaryDirectory() as directory:
        paths = Path(directory, "tokens.npy"), Path(directory, "offsets.npy")
        np.save(paths[0], tokens)
        np.save(paths[1], offsets)
        return build.measure(*paths, opened.manifest.vocab_size, options.threads)


def _lookups(options: Any) -> dict[str, Any] | None:
    if options.large is None:
        return None
    opened = Datastore.open(options.large, dense=False)
    segment = opened.segments[0].segment
    tokens, _ = segment.plain()
    measured = lookups.measure(
        SegmentSet([segment], opened.manifest.token_dtype), lookups.contexts_of(tokens, _CONTEXTS)
    )
    return {**measured, "live_append": lookups.measure_live(tokens, opened.manifest.vocab_size)}


def _service(options: Any) -> dict[str, Any] | None:
    results = {}
    for name, path in (("large", options.large), ("store", options.store)):
        if path is None:
            continue
        contexts = lookups.contexts_of(Datastore.open(path, dense=False).segments[0].segment.plain()[0], _CONTEXTS)
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            results[name] = service.measure(path.absolute(), contexts)
        finally:
            ray.shutdown()
    return results or None


def _dense(options: Any) -> dict[str, Any] | None:
    if options.store is None:
        return None
    opened = Datastore.open(options.store)
    vectors = np.concatenate([np.asarray(s.dense.vectors, np.float32) for s in opened.segments if s.dense is not None])
    prompts = load_prompts(options.prompts, load_tokenizer(resolve_model(options.model)), options.questions)
    return dense.measure(vectors, opened.embedder().encode([prompt.question for prompt in prompts]))


def _focus(options: Any) -> dict[str, Any] | None:
    if options.store is None or options.focus_prompts is None or options.focus_corpus is None:
        return None
    return focus.measure(Datastore.open(options.store), options.focus_prompts, options.focus_corpus, options.questions)


def _sources(options: Any) -> dict[str, Any] | None:
    if options.store is None:
        return None
    tokenizer = load_tokenizer(resolve_model(options.model))
    prompts = load_prompts(options.prompts, tokenizer, options.per_task)
    opened = Datastore.open(options.store)
    return sources.measure(
        options.model, prompts, opened, options.slots, options.budget, options.max_new_tokens, options.passages
    )


_MEASURES = {
    "build": _build,
    "lookups": _lookups,
    "service": _service,
    "dense": _dense,
    "focus": _focus,
    "sources": _sources,
}


if __name__ == "__main__":
    main()
